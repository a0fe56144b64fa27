"""The cells of a point cloud in the order of windows of a grid, and cut into groups of equal size."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.core.readable import known
from foveate.nn.parts.grid import Size, sides


class FlatGroups(NamedTuple):
    """Groups of g tokens that attend to each other, G of them.

    Attributes:
        tokens: the number of the token in each place.
        own: for each token, the place whose output is its own; places are counted through all groups.
        seen: False in places that no token fills; None if all are filled.
    """

    tokens: Int[Tensor, "groups g"]
    own: Int[Tensor, " m"]
    seen: Bool[Tensor, "groups g"] | None


def flat_window_order(
    coords: Int[Tensor, "m 3"], window: int | Size = 13, axis: Literal["x", "y"] = "x", shift: bool = False
) -> Int[Tensor, " m"]:
    """Return the order in which cells follow each other through the windows of a grid: numbers of cells.

    Samples come one after the other. In axis "x", rows of windows come in order, and the path through them turns
    around at their ends; inside a window it runs through its columns, down and up in turns. Axis "y" swaps rows and
    columns. Cells that are neighbours in the order are near in space, windows of any population follow each other
    without gaps, and no grid is made: O(M log M) time.

    Args:
        coords: (sample, row, column) of each cell, whole numbers.
        window: `(h, w)`, or one number for both.
        axis: "x" or "y".
        shift: True moves the windows by half of their sides.

    Raises:
        OptionError: an option out of range.
        ShapeError: coordinates of another shape, or of real numbers.
    """
    height_and_width = sides("window", window)
    validate.one_of("axis", axis, ("x", "y"))
    validate.flag("shift", shift)
    check_coords(coords)
    sample, *cell = coords.long().unbind(1)
    rows, columns = ((at + side // 2 if shift else at, side) for at, side in zip(cell, height_and_width, strict=True))
    along, across = (columns, rows) if axis == "x" else (rows, columns)
    (outer, inner), (rank, place) = ((at // side, at % side) for at, side in (along, across))
    turn = _sign(rank)
    return _sorted(sample, rank, turn * outer, turn * inner, turn * _sign(inner) * place)


def flat_groups(sample: Int[Tensor, " m"], order: Int[Tensor, " m"], size: int) -> FlatGroups:
    """Cut the tokens of each sample, in this order, into groups of `size`.

    The last group of a sample gets the tokens before it too, as many as it lacks: its tokens attend to the last `size`
    tokens of the sample. A sample of fewer tokens is one group, whose other places stay empty.

    Args:
        sample: the sample of each token.
        order: numbers of tokens, samples one after the other.
        size: g.

    Raises:
        ShapeError: a sample with a number below 0.
    """
    validate.count("group_size", size, 1)
    sample, size = sample[order], max(1, min(size, len(order)))
    if len(sample) and known(sample[0] < 0):
        raise ShapeError(f"samples are counted from 0; coords have a sample {int(sample[0])}")
    counts = torch.bincount(sample)
    groups = -(-counts // size)
    start, first = counts.cumsum(0) - counts, groups.cumsum(0) - groups
    of = torch.repeat_interleave(groups)  # the sample of each group
    places = torch.arange(size, device=order.device)
    rank = (torch.arange(len(of), device=order.device) - first[of])[:, None] * size + places
    rank = torch.where(rank < counts[of][:, None], rank, rank - size)
    seen = rank >= 0
    own = torch.empty_like(order)
    own[order] = first[sample] * size + torch.arange(len(order), device=order.device) - start[sample]
    tokens = order[start[of][:, None] + rank.clamp_min(0)]
    return FlatGroups(tokens, own, None if known(seen.all()) else seen)


def check_coords(coords: Tensor) -> None:
    """Refuse what is not a list of cells, `(M, 3)` whole numbers."""
    is_whole = isinstance(coords, Tensor) and not coords.is_floating_point() and coords.dtype != torch.bool
    if not is_whole or coords.dim() != 2 or coords.shape[1] != 3:
        raise ShapeError(f"coords must be whole numbers (M, 3): sample, row, column; got {shown(coords)}")


def _sorted(*keys: Tensor) -> Tensor:
    """Return the order by the first key, where it is equal by the second, and so on."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _sign(x: Tensor) -> Tensor:
    """Return 1 for even and -1 for odd numbers."""
    return 1 - 2 * (x % 2)
