"""FNA: neighbourhood attention in one, two and three dimensions, a tile of queries at a time.

Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level (2024),
arXiv 2403.04690.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, final

import torch
from torch import Tensor

from foveate.ops.base.neighborhood import Neighborhood, PerAxis, axis_rules


@final
class FNA(Neighborhood):
    """Each cell sees the `window` cells around it along each axis.

    Along an axis of length L, query i sees the keys `c - window // 2` to `c + (window - 1) // 2` around the centre
    `c = i`, which is moved inward near an end, so that every query sees `window` keys. A causal axis has the keys
    `i - window + 1` to `i`, fewer at its start. With dilation r the same holds within each residue class modulo r. Axes
    may differ in all of this. A window of one cell gives the values, a window of the whole grid full attention.

    Cost O(N prod(window) D): a tile of neighbouring queries reads the box of keys that any of them sees, and masks the
    rest of it. No call holds the weights of more than a few tiles. The wrong choice where distant cells have to be
    compared.

    Args:
        grid: lengths of one, two or three axes; their product is N. The first may be -1, for calls of any length; (-1,)
            is one axis.
        window: keys along each axis, one number or one per axis; `window * dilation` is at most the axis.
        dilation: distance between neighbouring keys of a window.
        causal: axes along which no later cell is seen.

    The release's relative position bias, which it has removed since, is left out.
    """

    def __init__(
        self,
        grid: Sequence[int] = (-1,),
        window: PerAxis = 7,
        dilation: PerAxis = 1,
        causal: bool | tuple[bool, ...] = False,
    ) -> None:
        super().__init__(grid, window, dilation, 1, causal)

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        return cls((-1,), max(1, round(budget * length)))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        side = 4 if length % 4 == 0 else 1
        return cls((-1, side), (max(1, length // side // 2), min(3, side)))

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        side = 4 if length % 4 == 0 else 1
        return cls((length // side, side), (length // side, side))


def neighborhood_mask(
    grid: Sequence[int], window: PerAxis, dilation: PerAxis = 1, causal: bool | tuple[bool, ...] = False,
    stride: PerAxis = 1,
) -> Tensor:  # fmt: skip
    """Return which cell (columns) each cell (rows) of a grid sees, bool `(N, N)`. It takes O(N²) memory.

    Args:
        grid, window, dilation, causal: see `FNA`.
        stride: see `GNA`.
    """
    seen = torch.ones(1, 1, dtype=torch.bool)
    for rule in axis_rules(grid, window, dilation, stride, causal):
        seen = (seen[:, None, :, None] & rule.seen[:, None, :]).flatten(2).flatten(0, 1)
    return seen
