"""Windows of a map that overlap, and attention in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size
from foveate.nn.parts.multi_head import MultiHeadAttention


@dataclass(frozen=True)
class OverlappingWindows:
    """A grid cut into windows of `side x side` tokens that share `overlap` rows or columns with the next one.

    The last window along an axis ends where the grid ends, so that it may share more. A window is never longer than the
    grid.

    Args:
        size: `(H, W)` of the grid.
        side: rows and columns of a window.
        overlap: rows and columns that two neighbours share, fewer than `side`.
    """

    size: Size
    side: int
    overlap: int

    def places(self, axis: int, device: torch.device | str | None = None) -> Int[Tensor, "windows side"]:
        """Return the rows (axis 0) or the columns (axis 1) of each window along that axis."""
        length = self.size[axis]
        side = min(self.side, length)
        step = max(1, side - self.overlap)
        starts = torch.arange(-(-(length - side) // step) + 1, device=device) * step
        return starts.clamp(max=length - side)[:, None] + torch.arange(side, device=device)

    def partition(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "windows t c"]:
        """Return the tokens of each window, row by row; the windows of one image are neighbours in the batch."""
        rows, columns = self.places(0, x.device), self.places(1, x.device)
        cut = x.unflatten(1, self.size)[:, rows[:, None, :, None], columns[None, :, None, :]]
        return rearrange(cut, "b r s h w c -> (b r s) (h w) c")

    def merge(self, x: Float[Tensor, "windows t c"]) -> Float[Tensor, "b n c"]:
        """Return, for each token of the grid, the mean over the windows that hold it."""
        rows, columns = self.places(0, x.device), self.places(1, x.device)
        (r, h), (s, w) = rows.shape, columns.shape
        x = rearrange(x, "(b r s) (h w) c -> b (r h) (s w) c", r=r, s=s, h=h, w=w)
        return _mean(_mean(x, 1, rows, self.size[0]), 2, columns, self.size[1]).flatten(1, 2)


def _mean(x: Tensor, axis: int, places: Int[Tensor, "windows side"], length: int) -> Tensor:
    """Average the entries of an axis that belong to the same place."""
    shape, at = [*x.shape], places.flatten()
    shape[axis] = length
    counts = x.new_zeros(length).index_add(0, at, x.new_ones(len(at)))
    total = x.new_zeros(shape).index_add(axis, at, x)
    return total / counts.view(-1, *(1,) * (x.dim() - axis - 1))


@final
class OverlappingWindowAttention(Layer):
    """Multi-head attention in windows that overlap; outputs of shared tokens are averaged: O(N t C), t tokens each.

    This is CATANet's local-region self-attention (LRSA). The overlap lets neighbouring windows agree at their borders,
    where separate windows leave seams. The wrong choice if distant tokens have to be compared, or for text, since it
    sees the future.

    Args:
        dim, heads: C and H, a divisor of C.
        window: rows and columns of a window.
        overlap: rows and columns that neighbours share, fewer than `window`.
        qk_dim: width of queries and keys of all heads together, a multiple of H; None for C.

    Raises:
        OptionError: an option out of range.

    The release divides where three windows meet by 4, not by 3: this happens if the last window along an axis starts a
    single row or column after the one before. Here the mean counts each window once.

    CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025), arXiv 2503.06896.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(self, dim: int, heads: int, window: int = 16, overlap: int = 2, *, qk_dim: int | None = None) -> None:
        super().__init__(dim, heads)
        validate.count("window", window, 1)
        validate.count("overlap", overlap, 0)
        if overlap >= window:
            raise OptionError(f"overlap={overlap} must be less than window={window}")
        self.window, self.overlap = window, overlap
        head_dim, value_dim = head_widths(dim, heads, qk_dim)
        self.attention = MultiHeadAttention(dim, heads, head_dim=head_dim, value_dim=value_dim)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        windows = OverlappingWindows(inputs["size"], self.window, self.overlap)
        return windows.merge(self.attention(windows.partition(x)))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 3, 1, qk_dim=3 * heads)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


def head_widths(dim: int, heads: int, qk_dim: int | None) -> tuple[int, int]:
    """Return the widths of a head's queries and of its values, for all heads' queries of `qk_dim` (None for `dim`)."""
    qk_dim = dim if qk_dim is None else qk_dim
    validate.count("qk_dim", qk_dim, 1)
    for name, width in (("dim", dim), ("qk_dim", qk_dim)):
        if width % heads:
            raise OptionError(f"heads={heads} must divide {name}={width}")
    return qk_dim // heads, dim // heads
