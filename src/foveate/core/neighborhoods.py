"""The neighbourhoods of a grid's cells as a `Selection`: products of one interval per axis.

An axis is cut into residue classes by its dilation, a class into chunks of neighbouring positions. The queries of a
tile, a product of chunks, see keys in a box, a product of intervals. So each tile reads one box of keys, and what its
single queries see of it is a product too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.readable import remembered
from foveate.core.selection import Selection

#: Sides of a tile that are tried, and the queries whose work equals that of copying a key and its value.
SIDES, COPY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128), 16
#: Most queries of a tile: more of them only read more keys that they do not see.
TALLEST = 256


@dataclass(frozen=True)
class AxisRule:
    """The keys that a position sees along one axis.

    Args:
        length: positions.
        window: keys that a query sees.
        dilation: distance between neighbouring keys of a window.
        stride: neighbouring queries that share a window.
        causal: whether a query sees no later position.
    """

    length: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def interval(self, at: int) -> tuple[int, int]:
        """Return the first and the last key of a position, counted within its residue class.

        The window belongs to the leader of the query's group: the one in the middle, or the last one if `causal`. Near
        an end the window slides inward, so that every query sees `window` keys; if `causal`, it is cut off there.
        """
        place, last = at // self.dilation, (self.length - 1 - at % self.dilation) // self.dilation
        group, left, right = place // self.stride * self.stride, self.window // 2, (self.window - 1) // 2
        if self.causal:
            return max(min(group + self.stride - 1, last) - self.window + 1, 0), place
        centre = min(max(min(group + self.stride // 2, last), left), last - right)
        return centre - left, centre + right

    @cached_property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """The interval of each position."""
        return tuple(self.interval(at) for at in range(self.length))

    @property
    def keys_read(self) -> float:
        """The mean number of keys that a position sees."""
        return sum(last - first + 1 for first, last in self.intervals) / max(self.length, 1)

    @cached_property
    def seen(self) -> Bool[Tensor, "n n"]:
        """Return which key positions (columns) each query position (rows) sees."""
        at = torch.arange(self.length)
        first, last = torch.tensor(self.intervals, dtype=torch.long).reshape(-1, 2)[:, :, None].unbind(1)
        place = at // self.dilation
        return (at[:, None] % self.dilation == at % self.dilation) & (place >= first) & (place <= last)

    def chunks(self, side: int) -> list[range]:
        """Return the positions of each chunk: up to `side` neighbours of one residue class."""
        classes = (range(start, self.length, self.dilation) for start in range(min(self.dilation, self.length)))
        return [each[at : at + side] for each in classes for at in range(0, len(each), side)]

    def ends(self, chunk: range) -> tuple[tuple[int, int], ...]:
        """Return the interval of each query of a chunk, counted from the first key of its box."""
        first = self.intervals[chunk[0]][0]
        return tuple(
            (low - first, high - first + 1) for low, high in self.intervals[chunk[0] : chunk[-1] + 1 : self.dilation]
        )

    def box(self, chunk: range) -> range:
        """Return the keys that any query of a chunk sees; later queries never see less far."""
        start = chunk[0] % self.dilation
        first, last = self.intervals[chunk[0]][0], self.intervals[chunk[-1]][1]
        return range(start + first * self.dilation, start + last * self.dilation + 1, self.dilation)


@dataclass(frozen=True)
class Axis:
    """The chunks of an axis and the keys that each of them reads; -1 fills up short ones.

    Args:
        queries: positions `(chunks, side)`.
        keys: positions `(chunks, reach)`.
        seen: which query sees which key, `(chunks, side, reach)`.
    """

    queries: Int[Tensor, "c s"]
    keys: Int[Tensor, "c r"]
    seen: Bool[Tensor, "c s r"]

    @classmethod
    def of(cls, rule: AxisRule, side: int, device: torch.device) -> Axis:
        chunks = rule.chunks(side)
        queries, keys = _filled(chunks, device), _filled([rule.box(chunk) for chunk in chunks], device)
        ends = torch.tensor(rule.intervals, dtype=torch.long, device=device)[queries.clamp_min(0)]
        place = (keys // rule.dilation)[:, None]
        seen = (place >= ends[..., :1]) & (place <= ends[..., 1:])
        return cls(queries, keys, seen & (queries >= 0)[..., None] & (keys >= 0)[:, None])


def _filled(rows: Sequence[range], device: torch.device) -> Int[Tensor, "c n"]:
    """Return ranges as rows of one length, with -1 behind the short ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=device)


@dataclass(frozen=True, eq=False)
class Neighborhoods(Selection):
    """The cells of a grid that each cell sees; tokens are cells row by row.

    Args:
        rules: one for each axis.
        axes: the same rules, cut into chunks.
    """

    rules: tuple[AxisRule, ...]
    axes: tuple[Axis, ...]

    @property
    def n_queries(self) -> int:  # type: ignore[override]
        return prod(self.grid)

    @property
    def n_keys(self) -> int:  # type: ignore[override]
        return self.n_queries

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(rule.length for rule in self.rules)

    @property
    def tiles(self) -> tuple[int, ...]:
        """The number of chunks of each axis."""
        return tuple(axis.queries.shape[0] for axis in self.axes)

    def dense(self, rows: slice = slice(None)) -> Bool[Tensor, "b h q k"]:
        device = self.axes[0].keys.device
        mine = torch.arange(self.n_queries, device=device)[rows]
        theirs = torch.unravel_index(torch.arange(self.n_keys, device=device), self.grid)
        seen = torch.ones(len(mine), self.n_keys, dtype=torch.bool, device=device)
        for rule, here, there in zip(self.rules, torch.unravel_index(mine, self.grid), theirs, strict=True):
            seen &= rule.seen.to(device)[here][:, there]
        return seen[None, None]

    def for_heads(self, heads: int) -> Neighborhoods:
        return self

    def keys_read(self) -> float:
        return prod(rule.keys_read for rule in self.rules)

    # -- tiles as boxes, which need no list of keys --------------------------------------------------------------------

    def boxes(self) -> Iterator[tuple[tuple[range, ...], tuple[range, ...], Bool[Tensor, "q n"] | None]]:
        """Yield the queries of each tile and the keys that they read, one range for each axis, and which query sees
        which key; None if each sees all. Tiles in which that is equal share the tensor."""
        sides = [axis.queries.shape[1] for axis in self.axes]
        for chunks in product(*(rule.chunks(side) for rule, side in zip(self.rules, sides, strict=True))):
            keys = tuple(rule.box(chunk) for rule, chunk in zip(self.rules, chunks, strict=True))
            ends = tuple(rule.ends(chunk) for rule, chunk in zip(self.rules, chunks, strict=True))
            if ends not in self._masks:
                self._masks[ends] = self._mask(ends, [len(box) for box in keys])
            yield chunks, keys, self._masks[ends]

    @cached_property
    def _masks(self) -> dict[tuple[tuple[tuple[int, int], ...], ...], Tensor | None]:
        return {}

    def _mask(self, ends: tuple[tuple[tuple[int, int], ...], ...], reaches: Sequence[int]) -> Tensor | None:
        if all(interval == (0, reach) for axis, reach in zip(ends, reaches, strict=True) for interval in axis):
            return None
        device = self.axes[0].keys.device
        seen = torch.ones(1, 1, dtype=torch.bool, device=device)
        for axis, reach in zip(ends, reaches, strict=True):
            at, (low, high) = torch.arange(reach, device=device), torch.tensor(axis, device=device).T[..., None]
            part = (at >= low) & (at < high)
            seen = (seen[:, None, :, None] & part[:, None, :]).flatten(2).flatten(0, 1)
        return seen

    # -- tiles as lists of keys ----------------------------------------------------------------------------------------

    @property
    def n_rows(self) -> int:
        return prod(self.tiles)

    @property
    def tall(self) -> int:
        return prod(axis.queries.shape[1] for axis in self.axes)

    @property
    def widest(self) -> int:
        return prod(axis.keys.shape[1] for axis in self.axes)

    @cached_property
    def order(self) -> Int[Tensor, " n"]:
        """The tokens tile by tile, -1 where a tile is not full."""
        device = self.axes[0].keys.device
        return self._cells([axis.queries for axis in self.axes], torch.arange(self.n_rows, device=device)).flatten()

    @cached_property
    def places(self) -> Int[Tensor, " n"]:
        """The place of each token in `order`."""
        full = (self.order >= 0).nonzero()[:, 0]
        return full[self.order[full].argsort()]

    def gathered(self, rows: slice) -> tuple[Int[Tensor, "b h i n"], Bool[Tensor, "b h i q n"]]:
        """Return the keys to gather for some tiles, and which query sees which of them; see `Blocks.gathered`."""
        device = self.axes[0].keys.device
        tiles = torch.arange(self.n_rows, device=device)[rows]
        keys = self._cells([axis.keys for axis in self.axes], tiles)
        places = torch.unravel_index(tiles, self.tiles)
        seen = self.axes[0].seen[places[0]]
        for axis, place in zip(self.axes[1:], places[1:], strict=True):
            part = axis.seen[place]
            seen = (seen[:, :, None, :, None] & part[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        return keys.clamp_min(0)[None, None], seen[None, None]

    def _cells(self, positions: Sequence[Int[Tensor, "_c _n"]], tiles: Int[Tensor, " t"]) -> Int[Tensor, "t m"]:
        """Return the tokens of tiles, given the positions of each axis's chunks; -1 where one of them is -1."""
        places = torch.unravel_index(tiles, self.tiles)
        cells = positions[0][places[0]]
        for rule, axis, place in zip(self.rules[1:], positions[1:], places[1:], strict=True):
            part = axis[place][:, None, :]
            cells = torch.where((cells[..., None] < 0) | (part < 0), -1, cells[..., None] * rule.length + part)
            cells = cells.flatten(1)
        return cells


@remembered
def neighborhoods(rules: tuple[AxisRule, ...], device: torch.device) -> Neighborhoods:
    """Return the neighbourhoods of a grid, in the tiles that read the fewest keys for each query.

    A tile of more queries reads a larger box, of which each query sees less; a tile of fewer copies more keys.
    """
    best, least = (1,) * len(rules), float("inf")
    for side in SIDES:
        sides = tuple(min(side, -(-rule.length // rule.dilation)) for rule in rules)
        tall = prod(sides)
        reach = prod(
            max(len(rule.box(chunk)) for chunk in rule.chunks(each)) for rule, each in zip(rules, sides, strict=True)
        )
        cost = reach * (1 + COPY / tall)
        if cost < least and tall <= TALLEST:
            best, least = sides, cost
    return Neighborhoods(rules, tuple(Axis.of(rule, side, device) for rule, side in zip(rules, best, strict=True)))
