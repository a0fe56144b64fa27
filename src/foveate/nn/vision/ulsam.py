"""Subspace attention: each group of channels has its own map of attention over the positions.

ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks (2020), arXiv 2006.15102.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.spatial import BATCH_NORM, CONV, around

#: The release's share of the newest batch in running statistics.
MOMENTUM = 0.9


@final
class ULSAM(FeatureGate):
    """`F_n + A_n F_n` for each group of channels F_n, with `A_n = softmax(PW(maxpool(DW(F_n))))` over all positions.

    DW scales each channel, the pool is 3 wide, and PW adds the group's channels up to one score for each position. It
    goes into compact networks of separable convolutions, often in the place of one of their last blocks. Cost O(N C)
    for N positions, with no N x N matrix. The wrong choice for maps of many positions: a weight is 1 / N on average, so
    that the output is then nearly the input.

    Args:
        channels: C.
        num_splits: the number of groups, which the paper calls subspaces; a divisor of C.
        dims: number of spatial axes, 1, 2 or 3.
        variant: "release" adds biases to DW and PW, and a batch norm and a ReLU behind each, so that scores are at
            least 0: 5 C + 3 num_splits parameters. "paper" has the formula's 2 C weights; biases would cancel in the
            softmax.

    Raises:
        OptionError: `num_splits` does not divide `channels`.
    """

    def __init__(
        self, channels: int, num_splits: int = 4, *, dims: int = 2, variant: Literal["paper", "release"] = "paper"
    ) -> None:
        super().__init__(channels, dims)
        validate.count("num_splits", num_splits, 1)
        validate.one_of("variant", variant, ("paper", "release"))
        if channels % num_splits:
            raise OptionError(f"num_splits={num_splits} must divide channels={channels}")
        self.num_splits, self.variant = num_splits, variant
        released = variant == "release"
        self.depthwise = CONV[dims](channels, channels, 1, groups=channels, bias=released)
        self.pointwise = CONV[dims](channels, num_splits, 1, groups=num_splits, bias=released)
        self.depthwise_norm = _norm_and_relu(channels, dims) if released else nn.Identity()
        self.pointwise_norm = _norm_and_relu(num_splits, dims) if released else nn.Identity()

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b g *space"]:
        """Return the map of each group; over the positions it adds up to 1."""
        self._check(x)
        return self._weights(x)

    def _weights(self, x: Tensor) -> Tensor:
        near = around(self.depthwise_norm(self.depthwise(x)))
        scores = self.pointwise_norm(self.pointwise(near))
        return torch.softmax(scores.flatten(2), -1).unflatten(2, scores.shape[2:])

    def _gate(self, x: Tensor) -> Tensor:
        factors = 1 + self._weights(x)
        return (x.unflatten(1, (self.num_splits, -1)) * factors[:, :, None]).flatten(1, 2)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, num_splits=2, dims=dims, variant="release")


def _norm_and_relu(channels: int, dims: int) -> nn.Sequential:
    return nn.Sequential(BATCH_NORM[dims](channels, momentum=MOMENTUM), nn.ReLU())
