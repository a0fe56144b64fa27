"""The attention of bottleneck transformers: all positions of a map, with relative positions along each axis.

Bottleneck Transformers for Visual Recognition (2021), arXiv 2101.11605.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.offsets import relative_scores
from foveate.nn.parts.spatial import like_map, tokens


@final
class BottleneckAttention(FeatureGate):
    """Multi-head attention of each position of a map to all, in the place of the 3x3 convolution of a residual block.

        logits[i, j] = q_i (k_j + r_row[row_j - row_i] + r_column[column_j - column_i]) / sqrt(D)

    The output is the values' weighted sum: there is no shortcut and no output projection, since the block around it has
    both. Cost O(N² C). It belongs into the last stages, whose maps are small; the wrong choice for large maps, and
    behind a module of a trained network, whose output it replaces.

    Args:
        channels: C.
        heads: H, a divisor of C; D is C / H.
        size: the largest map: a side, or one for each axis. Smaller maps take the middle of the tables.
        relative: False leaves out r_row and r_column, tables of `2 size - 1` vectors for each axis.
        bias: True gives queries, keys and values biases.
        dims: number of spatial axes, 1, 2 or 3, each with a table. The paper has 2.

    Raises:
        OptionError: channels that `heads` does not divide. ShapeError: a map larger than `size`.

    timm's `BottleneckAttn` does not divide the relative part by `sqrt(D)` unless `scale_pos_embed=True`.
    """

    def __init__(
        self, channels: int, heads: int = 4, *, size: int | Sequence[int] = 14, relative: bool = True,
        bias: bool = False, dims: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        validate.count("heads", heads, 1)
        if channels % heads:
            raise OptionError(f"heads={heads} must divide channels={channels}")
        self.heads, self.size = heads, _sides(size, dims)
        width = channels // heads
        self.qkv = nn.Linear(channels, 3 * channels, bias)
        nn.init.trunc_normal_(self.qkv.weight, std=channels**-0.5)
        tables = [torch.empty(2 * side - 1, width) for side in self.size] if relative else []
        self.tables = nn.ParameterList(nn.init.trunc_normal_(table, std=width**-0.5) for table in tables)

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b h n n"]:
        """Return the weights of all positions (last axis) for each position; they add up to 1."""
        self._check(x)
        q, k, _ = self._heads(x)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        positions = self._positions(q, x)
        return torch.softmax(logits if positions is None else logits + positions, -1)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(split(part, self.heads) for part in self.qkv(tokens(x)).chunk(3, -1))

    def _positions(self, q: Float[Tensor, "b h n d"], x: Tensor) -> Float[Tensor, "b h n n"] | None:
        """Return what relative positions add to the logits."""
        if not len(self.tables):
            return None
        vectors = []
        for table, sides, largest in zip(self.tables, x.shape[2:], self.size, strict=True):
            place = torch.arange(sides, device=x.device)
            vectors.append(table[place - place[:, None] + largest - 1])
        scaled = q * q.shape[-1] ** -0.5
        return relative_scores(scaled.unflatten(2, x.shape[2:]), vectors)

    def _gate(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._positions(q, x))
        return like_map(merge(out), x)

    def _check(self, x: Tensor) -> None:
        super()._check(x)
        if len(self.tables) and any(side > most for side, most in zip(x.shape[2:], self.size, strict=True)):
            raise ShapeError(f"x must be at most size={self.size} along its axes; got {tuple(x.shape)}")

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, heads=2, size=40 if dims == 1 else 8, dims=dims)


def _sides(size: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return the largest side along each axis."""
    sides = tuple(size) if isinstance(size, Sequence) else (size,) * dims
    if len(sides) != dims:
        raise OptionError(f"size={shown(size)} must be a whole number, or {dims} of them")
    for side in sides:
        validate.count("size", side, 1)
    return sides
