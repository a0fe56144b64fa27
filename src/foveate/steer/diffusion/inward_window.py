"""Attention within a window of a grid that slides inward at the borders, so that its size is the same everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown

#: The largest number of pairs in the mask of one tile.
TILE = 1 << 22


class Span(NamedTuple):
    """The positions along one axis that a query sees: `size` of them, from `first(position)` on."""

    length: int
    half: int

    @property
    def size(self) -> int:
        return min(self.length, 2 * self.half + 1)

    def first(self, position: int) -> int:
        return min(max(position - self.half, 0), self.length - self.size)

    def seen(self, queries: range, keys: range, device: torch.device) -> Bool[Tensor, "q k"]:
        """Return which of some keys some queries see."""
        first = (torch.arange(queries.start, queries.stop, device=device) - self.half).clamp(
            0, self.length - self.size
        )[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        return (key >= first) & (key < first + self.size)


def inward_window_mask(
    frames: int, height: int, width: int, half_h: int, half_w: int, device: torch.device | None = None
) -> Bool[Tensor, "n n"]:
    """Return which tokens of a grid `frames x height x width` see which others, as one mask; O(N²) memory.

    A query at `(t, y, x)` sees all frames, and the rows and columns of a window of `2 half + 1` around it. At a border
    the window is moved inward and not cut, so that every query sees as many tokens.

    Args:
        frames, height, width: the grid; tokens are in this order, columns fastest.
        half_h, half_w: rows above and below a query that it sees, and columns beside it.
        device: where to make the mask.
    """
    _check((frames, height, width), (half_h, half_w))
    place = device or torch.device("cpu")
    rows = Span(height, half_h).seen(range(height), range(height), place)
    columns = Span(width, half_w).seen(range(width), range(width), place)
    plane = (rows[:, None, :, None] & columns[None, :, None]).flatten(0, 1).flatten(1)
    return plane.repeat(frames, frames)


def inward_window_attention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n dv"],
    grid: tuple[int, int, int], half: tuple[int, int], scale: float | None = None,
) -> Float[Tensor, "b h n dv"]:  # fmt: skip
    """Return the attention of a grid's tokens within their inward windows, without the N x N matrix.

    Neighbouring queries are computed together by the fused kernel, over the keys that any of them sees. Cost: time and
    memory grow with `N * frames * window`. A window that covers the grid is plain attention.

    Args:
        q, k, v: tokens of the grid, columns fastest.
        grid: frames, height and width.
        half: rows and columns on each side of a query that it sees.
        scale: scale of the logits; None is `d ** -0.5`.
    """
    validate.tensors(q, k, v)
    _check(grid, half)
    frames, height, width = grid
    if q.shape[2] != frames * height * width or k.shape[2] != q.shape[2] or k.shape[1] != q.shape[1]:
        raise ShapeError(
            f"q, k, v must have equal heads and a token for each place of grid={grid}; got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}"
        )
    rows, columns = Span(height, half[0]), Span(width, half[1])
    if rows.size == height and columns.size == width:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    q, k, v = (x.unflatten(2, grid) for x in (q, k, v))
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for top in _tiles(rows):
        for left in _tiles(columns):
            out[:, :, :, top.start : top.stop, left.start : left.stop] = _tile(q, k, v, rows, columns, top, left, scale)
    return out.flatten(2, 4)


def _tiles(axis: Span) -> list[range]:
    """Cut an axis into stretches of a quarter of the window: short ones compute fewer pairs that nobody sees."""
    step = max(1, axis.size // 4)
    return [range(start, min(start + step, axis.length)) for start in range(0, axis.length, step)]


def _tile(
    q: Tensor, k: Tensor, v: Tensor, rows: Span, columns: Span, top: range, left: range, scale: float | None
) -> Tensor:
    """Return the output `(B, H, F, rows, columns, Dv)` of one tile of queries, a few frames at a time."""
    high = range(rows.first(top.start), rows.first(top[-1]) + rows.size)
    wide = range(columns.first(left.start), columns.first(left[-1]) + columns.size)
    keys, values = (x[:, :, :, high.start : high.stop, wide.start : wide.stop].flatten(2, 4) for x in (k, v))
    seen = rows.seen(top, high, q.device)[:, None, :, None] & columns.seen(left, wide, q.device)[None, :, None]
    plane = seen.flatten(0, 1).flatten(1).repeat(1, q.shape[2])  # all frames of the keys
    step, parts = max(1, TILE // plane.numel()), []
    for some in q[:, :, :, top.start : top.stop, left.start : left.stop].split(step, 2):
        mask = plane.repeat(some.shape[2], 1)
        part = F.scaled_dot_product_attention(some.flatten(2, 4), keys, values, attn_mask=mask, scale=scale)
        parts.append(part.unflatten(2, some.shape[2:5]))
    return torch.cat(parts, 2)


def _check(grid: tuple[int, int, int], half: tuple[int, int]) -> None:
    for name, value, count, least in (("grid", grid, 3, 1), ("half", half, 2, 0)):
        if not isinstance(value, tuple) or len(value) != count:
            raise OptionError(f"{name}={shown(value)} must be {count} whole numbers")
        for number in value:
            validate.count(name, number, least)
