"""Dual attention: over the positions of a map, and over its channels.

Dual Attention Network for Scene Segmentation (2018), arXiv 1809.02983.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import finite, narrowed
from foveate.nn.parts.spatial import like_map, tokens

Variant = Literal["paper", "release"]


@final
class PositionAttention(FeatureGate):
    """`x + alpha P(x)`: softmax attention of each position to all, with logits `q_i k_j` that are not scaled.

    alpha is one learned number that starts at 0. Cost O(N² C).

    Args:
        channels: C, the width of values.
        reduction: C over the width of queries and keys, which is at least 1.
        hidden: the width itself, in the place of `reduction`.
        dims: number of spatial axes; None for 1, 2 or 3.
    """

    def __init__(
        self, channels: int, reduction: int = 8, *, hidden: int | None = None, dims: int | None = None
    ) -> None:
        super().__init__(channels, dims)
        width = narrowed(channels, reduction, hidden)
        self.query, self.key = nn.Linear(channels, width), nn.Linear(channels, width)
        self.value = nn.Linear(channels, channels)
        self.strength = nn.Parameter(torch.zeros(1))

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b n n"]:
        """Return the weights of all positions (last axis) for each position; they add up to 1."""
        self._check(x)
        return torch.softmax(self.query(tokens(x)) @ self.key(tokens(x)).mT, -1)

    def added(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """Return `alpha P(x)`."""
        q, k, v = (layer(tokens(x))[:, None] for layer in (self.query, self.key, self.value))
        return self.strength * like_map(F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0], x)

    def _gate(self, x: Tensor) -> Tensor:
        return x + self.added(x)


@final
class ChannelAttention(FeatureGate):
    """`x + beta A x`: each channel receives all channels, by the products of their maps.

    A is the softmax of rows of `scale x xᵀ`, the sums over all N positions of products of two channels. beta is one
    learned number that starts at 0, and there are no other parameters. Cost O(N C²). The products grow with N, so that
    without a smaller scale a channel of a large map often weighs itself alone.

    Args:
        channels: C.
        variant: "paper" as above: channels with similar maps weigh most. "release" takes the softmax of `max - x xᵀ`,
            so that those with the least similar maps do.
        scale: the factor on the products; the paper has none.
        dims: number of spatial axes; None for 1, 2 or 3.
    """

    def __init__(
        self, channels: int, *, variant: Variant = "paper", scale: float = 1.0, dims: int | None = None
    ) -> None:
        super().__init__(channels, dims)
        validate.one_of("variant", variant, ("paper", "release"))
        self.variant, self.scale = variant, finite("scale", scale)
        self.strength = nn.Parameter(torch.zeros(1))

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c c"]:
        """Return the weights of all channels (last axis) for each channel; they add up to 1."""
        self._check(x)
        return self._weights(x)

    def _weights(self, x: Tensor) -> Tensor:
        products = self.scale * x.flatten(2) @ x.flatten(2).mT
        return torch.softmax(products if self.variant == "paper" else -products, -1)

    def added(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        """Return `beta A x`."""
        return self.strength * (self._weights(x) @ x.flatten(2)).unflatten(2, x.shape[2:])

    def _gate(self, x: Tensor) -> Tensor:
        return x + self.added(x)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, scale=0.05)


@final
class DualAttentionGate(FeatureGate):
    """`x + alpha P(x) + beta A x`, of `PositionAttention` and `ChannelAttention`.

    It relates what repeats in a map: positions that look alike, wherever they are, and channels that respond at the
    same places. It begins as the identity. Cost O(N² C + N C²). The wrong choice for maps of many positions, or where
    a position means something: neither part knows any.

    Args:
        channels: C.
        reduction, hidden: see `PositionAttention`.
        variant, scale: see `ChannelAttention`.
        dims: number of spatial axes; None for 1, 2 or 3.

    The paper's network puts 3x3 convolutions in front of both parts, which divide C by 4, and behind them, and adds the
    two results up; x is then in the sum twice. Here it is in the sum once, so that the gate can be inserted.
    """

    def __init__(
        self, channels: int, reduction: int = 8, *, hidden: int | None = None, variant: Variant = "paper",
        scale: float = 1.0, dims: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        self.position = PositionAttention(channels, reduction, hidden=hidden)
        self.channel = ChannelAttention(channels, variant=variant, scale=scale)

    def _gate(self, x: Tensor) -> Tensor:
        return x + self.position.added(x) + self.channel.added(x)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, hidden=3)
