"""Coordinate attention: a channel's weight at a position is a product of one for the row and one for the column.

Coordinate Attention for Efficient Mobile Network Design (2021), arXiv 2103.02907.
"""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import narrowed


@final
class CoordinateAttention(FeatureGate):
    """`x * a_row * a_column`, where `a_row[c, i] = sigmoid(W_row f)` reads the mean of row i, and `a_column` columns.

    Means over each row and each column go through one layer, `f = hardswish(BN(W m))`, and then through a layer for
    each axis. A row does not see the columns: a weight of one pixel apart from its row and column cannot be expressed.
    Cost O(N C) for the means and `O((H + W) C² / reduction)` for the layers. The wrong choice for maps of a single
    axis, for which it is not defined.

    Args:
        channels: C.
        reduction: C over the width of f, which is at least 8.
        hidden: the width itself, in the place of `reduction`.
        bias: False leaves the biases out, as timm does by default; the release has them.
        dims: number of spatial axes, 2 or 3. The paper has 2; with 3 there is a mean, a layer and a factor for each of
            the three, where the paper has two.
    """

    axes: ClassVar[frozenset[int]] = frozenset({2, 3})

    def __init__(
        self, channels: int, reduction: int = 32, *, hidden: int | None = None, bias: bool = True, dims: int = 2
    ) -> None:
        super().__init__(channels, dims)
        width = narrowed(channels, reduction, hidden, least=8)
        self.narrow = nn.Conv1d(channels, width, 1, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        self.widen = nn.ModuleList(nn.Conv1d(width, channels, 1, bias=bias) for _ in range(dims))

    def weights(self, x: Float[Tensor, "b c *space"]) -> list[Float[Tensor, "b c n"]]:
        """Return the factors along each axis, such as those of rows and those of columns, between 0 and 1."""
        self._check(x)
        return self._weights(x)

    def _weights(self, x: Tensor) -> list[Tensor]:
        space = range(2, x.dim())
        means = [x.mean([other for other in space if other != axis]) for axis in space]
        together = F.hardswish(self.norm(self.narrow(torch.cat(means, 2))))
        parts = together.split(list(x.shape[2:]), 2)
        return [torch.sigmoid(widen(part)) for widen, part in zip(self.widen, parts, strict=True)]

    def _gate(self, x: Tensor) -> Tensor:
        for axis, weights in enumerate(self._weights(x)):
            shape = [1] * (x.dim() - 2)
            shape[axis] = weights.shape[2]
            x = x * weights.unflatten(2, shape)
        return x

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, hidden=5, dims=dims)
