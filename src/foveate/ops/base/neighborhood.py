"""Operators over the cells of a grid, each of which sees the cells of a window around it: FNA and GNA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.neighborhoods import AxisRule, neighborhoods
from foveate.core.readable import remembered
from foveate.core.selection import Blocks, Indices, Rule, Selection
from foveate.ops.base.selective import Selective

#: One number for all axes of a grid, or one for each.
PerAxis = int | tuple[int, ...]
#: Queries and keys of a tile along a single axis.
TILE = 64


def axis_rules(
    grid: Sequence[int], window: PerAxis, dilation: PerAxis = 1, stride: PerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
) -> tuple[AxisRule, ...]:  # fmt: skip
    """Return the rule of each axis.

    Raises:
        OptionError: a window that does not fit its axis, or a stride beyond its window.
    """
    _check_grid(grid)
    for length in grid:
        validate.count("grid", length, 1)
    found = []
    for axis, length in enumerate(grid):
        numbers = {"window": window, "dilation": dilation, "stride": stride}
        mine = {name: at_axis(name, given, axis, len(grid)) for name, given in numbers.items()}
        for name, each in mine.items():
            validate.count(name, each, 1)
        is_causal = at_axis("causal", causal, axis, len(grid))
        validate.flag("causal", is_causal)
        if mine["window"] * mine["dilation"] > length:
            raise OptionError(
                f"window={mine['window']} at dilation={mine['dilation']} is longer than axis {axis} of {length} cells; "
                f"at most {length // mine['dilation']} fit"
            )
        if mine["stride"] > mine["window"]:
            raise OptionError(f"stride={mine['stride']} must be at most window={mine['window']}")
        found.append(AxisRule(length, causal=is_causal, **mine))
    return tuple(found)


def _check_grid(grid: object) -> None:
    if not isinstance(grid, tuple | list) or not 1 <= len(grid) <= 3:
        raise OptionError(f"grid={shown(grid)} must be the lengths of one, two or three axes")


def at_axis(name: str, given: Any, axis: int, axes: int) -> Any:
    """Return the value for one axis of an option that is one value for all of them, or a tuple."""
    if not isinstance(given, tuple | list):
        return given
    if len(given) != axes:
        raise OptionError(f"{name}={shown(given)} must be one value, or one for each of the grid's {axes} axes")
    return given[axis]


class Neighborhood(Selective):
    """Softmax attention of each cell of a grid to the cells of a window: the product of one window per axis.

    Tokens are the cells row by row. Causal axes are an option; a call is never `causal`, which would mean the order of
    the cells.

    Args:
        grid: lengths of one, two or three axes. The first may be -1: the tokens of a call then say how long it is.
        window, dilation, stride, causal: see `FNA` and `GNA`.
    """

    capabilities = replace(Selective.capabilities, patterns=frozenset({"self"}), growth="N", streaming=None)

    def __init__(
        self, grid: Sequence[int], window: PerAxis, dilation: PerAxis, stride: PerAxis,
        causal: bool | tuple[bool, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        _check_grid(grid)
        self.grid = tuple(grid)
        self.axes = window, dilation, stride, causal
        is_open = self.grid[:1] == (-1,)
        # a first axis of any length is checked when it is known, and the other options now
        axis_rules((2**30, *self.grid[1:]) if is_open else self.grid, *self.axes)

    def rules(self, cells: int) -> tuple[AxisRule, ...]:
        """Return the rule of each axis of a grid of so many cells."""
        grid, inner = self.grid, prod(self.grid[1:])
        if grid[0] == -1 and cells % inner == 0:
            grid = (cells // inner, *grid[1:])
        if prod(grid) != cells or grid[0] == -1:
            raise ShapeError(f"q and k must have as many tokens as the grid {self.grid} has cells; got N={cells}")
        return axis_rules(grid, *self.axes)

    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        cells = k.shape[2]
        if not q.shape[2]:
            return Indices(torch.zeros(1, 1, 0, 1, dtype=torch.long, device=q.device), 0, cells)
        rules = self.rules(cells)
        if len(rules) == 1 and rules[0].dilation == 1:
            return intervals(rules[0], q.device)
        return neighborhoods(rules, q.device)


@remembered
def intervals(rule: AxisRule, device: torch.device) -> Blocks:
    """Return the windows of a single axis as tiles, which engines read without copying keys."""
    tiles = [rule.intervals[at : at + TILE] for at in range(0, rule.length, TILE)]
    ends = [(tile[0][0], tile[-1][0], tile[0][1], tile[-1][1]) for tile in tiles]
    low, lowest_all, high_all, high = torch.tensor(ends, device=device).T[..., None]
    first = torch.arange(len(tiles), device=device) * TILE
    last = (first + TILE).clamp_max(rule.length) - 1
    touched, whole = (first <= high) & (last >= low), (first >= lowest_all) & (last <= high_all)
    return Blocks(
        touched[None, None], (TILE, TILE), rule.length, rule.length, _between(rule, device), whole[None, None]
    )


@remembered
def _between(rule: AxisRule, device: torch.device) -> Rule:
    ends = torch.tensor(rule.intervals, device=device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = ends[q.clamp_max(rule.length - 1)]
        return (k >= mine[..., 0]) & (k <= mine[..., 1])

    return sees
