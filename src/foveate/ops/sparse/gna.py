"""GNA: neighbourhood attention whose neighbouring queries share windows, and the speed-up that tiles can reach.

Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light (2025), arXiv 2504.16922.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Self, final

from foveate.core import validate
from foveate.core.neighborhoods import AxisRule
from foveate.ops.base.neighborhood import Neighborhood, PerAxis, at_axis, axis_rules


@final
class GNA(Neighborhood):
    """Groups of `stride` neighbouring queries see the window of their leader.

    The leader is the query in the middle of its group (`stride // 2` after the first), or the last one on a causal
    axis; there each query of the group sees the leader's window up to itself. `stride=1` is `FNA`, and
    `stride=window` attends within blocks. The more queries share a window, the fewer keys a tile reads for nothing:
    `gna_simulate` says how fast a setting can be.

    Args:
        grid, window, dilation, causal: see `FNA`.
        stride: queries that share a window along each axis, at most `window`.
    """

    def __init__(
        self, grid: Sequence[int] = (-1,), window: PerAxis = 7, stride: PerAxis = 1, dilation: PerAxis = 1,
        causal: bool | tuple[bool, ...] = False,
    ) -> None:  # fmt: skip
        super().__init__(grid, window, dilation, stride, causal)

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        window = max(1, round(budget * length))
        return cls((-1,), window, min(window, 64))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        side = 4 if length % 4 == 0 else 1
        rows = length // side
        return cls((-1, side), (max(1, rows // 2), min(3, side)), (max(1, rows // 2), 1))

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        side = 4 if length % 4 == 0 else 1
        return cls((length // side, side), (length // side, side), (2, 1) if length // side > 1 else 1)


class Simulation(NamedTuple):
    """The tiles that a kernel visits, and the best speed-up it can reach.

    Args:
        speedup: key tiles of full attention over those that a query tile visits on average.
        flop_bound: the same for single keys: N over the keys that a query sees on average.
        visited: key tiles that a query tile visits on average.
        dense_share: share of the visited tiles of which every query sees every key, so that no mask is needed.
    """

    speedup: float
    flop_bound: float
    visited: float
    dense_share: float


def gna_simulate(
    grid: Sequence[int], window: PerAxis, stride: PerAxis = 1, dilation: PerAxis = 1,
    causal: bool | tuple[bool, ...] = False, *, q_tile: PerAxis, kv_tile: PerAxis,
) -> Simulation:  # fmt: skip
    """Count the tiles of keys that tiles of queries visit: the best speed-up that any kernel with these tiles reaches.

    Tokens are in the order of the tiles, so that a tile is a box of neighbouring cells of one residue class. A query
    tile visits each key tile of which any of its queries sees any key.

    Args:
        grid, window, stride, dilation, causal: see `GNA`.
        q_tile, kv_tile: cells of a tile along each axis.
    """
    rules = axis_rules(grid, window, dilation, stride, causal)
    visited = dense = tiles = 1.0
    for axis, rule in enumerate(rules):
        sides = [at_axis(name, given, axis, len(rules)) for name, given in (("q_tile", q_tile), ("kv_tile", kv_tile))]
        for name, side in zip(("q_tile", "kv_tile"), sides, strict=True):
            validate.count(name, side, 1)
        some, every, count = _visits(rule, *sides)
        visited, dense, tiles = visited * some, dense * every, tiles * count
    keys = prod(rule.keys_read for rule in rules)
    return Simulation(tiles / visited, prod(rule.length for rule in rules) / keys, visited, dense / visited)


def _visits(rule: AxisRule, q_side: int, kv_side: int) -> tuple[float, float, int]:
    """Return the visited chunks of keys of an axis, those without a mask, both per chunk of queries, and all chunks."""
    queries, keys = rule.chunks(q_side), rule.chunks(kv_side)
    some = every = 0
    for mine in queries:
        box, here = rule.box(mine), [theirs for theirs in keys if theirs[0] % rule.dilation == mine[0] % rule.dilation]
        some += sum(theirs[0] <= box[-1] and theirs[-1] >= box[0] for theirs in here)
        first, last = rule.intervals[mine[-1]][0], rule.intervals[mine[0]][1]  # what all of the queries see
        every += sum(theirs[0] // rule.dilation >= first and theirs[-1] // rule.dilation <= last for theirs in here)
    return some / len(queries), every / len(queries), len(keys)
