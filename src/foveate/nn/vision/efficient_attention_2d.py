"""Efficient attention as a block for the feature maps of a convolutional network.

Efficient Attention: Attention with Linear Complexities (2018), arXiv 1812.01243. The operator is
`foveate.ops.linear.efficient_attention`.
"""

from __future__ import annotations

from typing import final

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.linear.efficient_attention import EfficientAttention
from foveate.ops.operator import Operator, listed


@final
class EfficientAttention2d(nn.Module):
    """`x + reproject(attend(queries(x), keys(x), values(x)))` over all pixels of `x (B, C, H, W)`; 1x1 convolutions.

    A non-local block that costs O(H W) in time and memory, so it fits maps of high resolution. It reads global
    summaries: the wrong choice if single pixels have to find each other.

    Args:
        in_channels: C.
        key_channels: channels of queries and keys, all heads together.
        heads: heads that split these channels and the values'.
        value_channels: channels of the values; None for `key_channels`.
        op: another operator without causality in place of `EfficientAttention()`: `Softmax()` gives the non-local block
            of the paper's comparison.

    Raises:
        OptionError: channels that `heads` does not divide.
        UnsupportedPattern: an operator that is causal.
        ShapeError: a map of another number of channels.
    """

    def __init__(
        self, in_channels: int, key_channels: int, heads: int = 1, value_channels: int | None = None, *,
        op: Operator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        value_channels = key_channels if value_channels is None else value_channels
        sizes = {"key_channels": key_channels, "value_channels": value_channels}
        for name, value in {"in_channels": in_channels, "heads": heads, **sizes}.items():
            validate.count(name, value, 1)
        for name, value in sizes.items():
            if value % heads:
                raise OptionError(f"heads={heads} must divide {name}={value}")
        self.op = EfficientAttention() if op is None else op
        if "self" not in self.op.capabilities.patterns:
            raise UnsupportedPattern(
                f'op must define "self" attention; {self.op.name} does {listed(self.op.capabilities.patterns)}'
            )
        self.in_channels, self.heads = in_channels, heads
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"x must be (B, C={self.in_channels}, H, W); got {tuple(x.shape)}")
        q, k, v = (
            rearrange(conv(x), "b (heads c) h w -> b heads (h w) c", heads=self.heads)
            for conv in (self.queries, self.keys, self.values)
        )
        out = rearrange(self.op(q, k, v), "b heads (h w) c -> b (heads c) h w", h=x.shape[2])
        return x + self.reprojection(out)

    def templates(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads d h w"]:
        """Return the attention map of each key channel over all pixels, each with sum 1, for inspection."""
        k = rearrange(self.keys(x), "b (heads c) h w -> b heads c (h w)", heads=self.heads)
        return k.softmax(-1).unflatten(-1, x.shape[2:])
