"""Runs of query rows, and the ranges of keys that each sees: what the slices engine calls the fused kernel on.

Neighbouring runs that see equally many keys, each a constant distance behind those of the run before, form a series: a
window that slides. One call of the kernel serves a whole series, so that its runs may be short, and short runs see few
keys that a query does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.selection import Blocks

#: Queries up to which short tiles are joined for one call of the kernel, and for one run of a series.
TALL, SHORT = 128, 64
#: The fewest runs of a series.
LEAST = 4
#: Longest gap of unseen keys that is cheaper to read than to cut out.
GAP = 16

#: Start and end of a range of keys.
KeyRange = tuple[int, int]


class RowRun(NamedTuple):
    """Neighbouring block rows that share one call of the kernel.

    Args:
        rows, queries: their ranges.
        keys: the ranges of keys that any of the queries sees.
        seen: `(B or 1, H or 1, queries, keys)`, if the run before or after it has the same; None if the engine has to
            ask the selection, or if every pair counts.
        is_whole: whether every pair is known to count.
    """

    rows: slice
    queries: slice
    keys: tuple[KeyRange, ...]
    seen: Tensor | None = None
    is_whole: bool = False

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs of one head."""
        return (self.queries.stop - self.queries.start) * length(self.keys)


#: Runs that share a call of the kernel: a series, or one alone.
Series = tuple[RowRun, ...]


def plan(selection: Blocks, are_alone: bool = False) -> list[Series]:
    """Return the runs of a selection in their order; `are_alone` makes no series of several.

    Cached on the selection, since static selections are used again and again.
    """
    name = "_alone" if are_alone else "_plan"
    found = selection.__dict__.get(name)
    if found is None:
        runs = _with_shared(selection, joined(selection, TALL) if are_alone else rows(selection))
        found = [(run,) for run in runs] if are_alone or not _is_shared(selection) else _in_series(runs, _slides)
        selection.__dict__[name] = found
    return found


def untrimmed(selection: Blocks, are_alone: bool = False) -> list[Series]:
    """Return what `plan` is likely to be, without asking which pairs count."""
    if are_alone or not _is_shared(selection):
        return [(run,) for run in joined(selection, TALL)]
    return _in_series(rows(selection), _shifts)


def rows(selection: Blocks) -> list[RowRun]:
    """Return the runs of a plan before unseen keys are cut off: short ones if most of them are in series."""
    if _is_shared(selection):
        short = joined(selection, SHORT)
        served = sum(len(series) for series in _in_series(short, _shifts) if len(series) > 1)
        if 2 * served >= len(short):
            return short
    return joined(selection, TALL)


def _is_shared(selection: Blocks) -> bool:
    """Return whether all heads of all sequences see the same pairs, so that one mask serves a series."""
    return selection.blocks.shape[:2].numel() == 1


def length(keys: tuple[KeyRange, ...]) -> int:
    return sum(end - first for first, end in keys)


def positions(run: RowRun, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, end, device=device) for first, end in run.keys])


def seen(selection: Blocks, run: RowRun) -> Tensor | None:
    """Return the pairs of a run that count; None if all do."""
    if not run.keys:
        return None
    found = selection.seen(run.rows, positions(run, selection.blocks.device))
    return None if found is None else found[:, :, : run.queries.stop - run.queries.start]


def _in_series(runs: Sequence[RowRun], follows: Callable[[RowRun, RowRun], bool]) -> list[Series]:
    """Group neighbours of which each follows the one before at the same distance; few of them stay alone."""
    found: list[list[RowRun]] = []
    for run in runs:
        last = found[-1] if found else []
        if last and follows(last[-1], run) and (len(last) == 1 or step(last) == step([last[-1], run])):
            last.append(run)
        else:
            found.append([run])
    return [part for each in found for part in ([tuple(each)] if len(each) >= LEAST else [(run,) for run in each])]


def step(series: Sequence[RowRun]) -> int:
    """Return the distance between the keys of neighbouring runs."""
    return series[1].keys[0][0] - series[0].keys[0][0]


def _shifts(one: RowRun, other: RowRun) -> bool:
    """Return whether two runs have as many queries and, further on, as many keys in one range."""
    same = one.queries.stop - one.queries.start == other.queries.stop - other.queries.start
    single = len(one.keys) == len(other.keys) == 1
    return same and single and length(one.keys) == length(other.keys) and one.keys[0][0] < other.keys[0][0]


def _slides(one: RowRun, other: RowRun) -> bool:
    """Return whether the same pairs of two such runs count."""
    same = one.is_whole and other.is_whole if one.seen is None else one.seen is other.seen
    return same and _shifts(one, other)


def _with_shared(selection: Blocks, runs: list[RowRun]) -> list[RowRun]:
    """Drop keys that no query of a run sees, and store the visible pairs where neighbouring runs agree."""
    found: list[RowRun] = []
    before: Tensor | None = None
    for run in runs:
        run, mine = _trimmed(selection, run)
        run = run._replace(is_whole=mine is None and bool(run.keys))
        if before is not None and mine is not None and mine.shape == before.shape and torch.equal(mine, before):
            mine, found[-1], run = before, found[-1]._replace(seen=before), run._replace(seen=before)
        found.append(run)
        before = mine
    return found


def _trimmed(selection: Blocks, run: RowRun) -> tuple[RowRun, Tensor | None]:
    """Cut unseen keys from the ends of ranges and from long gaps; return the run and a mask of the pairs that count."""
    if (mine := seen(selection, run)) is None:
        return run, None
    places = positions(run, mine.device)[mine.flatten(0, 2).any(0)]
    gaps = (places.diff() > GAP).nonzero().flatten().tolist()
    firsts, lasts = [0, *(gap + 1 for gap in gaps)], [*gaps, len(places) - 1]
    keys = tuple((int(places[a]), int(places[b]) + 1) for a, b in zip(firsts, lasts, strict=True) if len(places))
    if keys != run.keys:
        run = run._replace(keys=keys)
        mine = seen(selection, run)
    return run, mine


def joined(selection: Blocks, most: int) -> list[RowRun]:
    """Return block rows as runs: those up to `most` queries are joined, and any that see the same keys. Cached too."""
    known = selection.__dict__.setdefault("_joined", {})
    if most in known:
        return known[most]
    tall, first, keys = selection.size[0], 0, None
    found: list[RowRun] = []
    for row, ranges in enumerate(_key_ranges(selection)):
        both = ranges if keys is None else _union(keys, ranges)
        if keys is not None and (row + 1 - first) * tall > most and not keys == ranges == both:
            found.append(_run(selection, first, row, keys))
            first, both = row, ranges
        keys = both
    if keys is not None:
        found.append(_run(selection, first, selection.blocks.shape[2], keys))
    known[most] = found
    return found


def _run(selection: Blocks, first: int, end: int, keys: tuple[KeyRange, ...]) -> RowRun:
    tall = selection.size[0]
    return RowRun(slice(first, end), slice(first * tall, min(end * tall, selection.n_queries)), keys)


def _key_ranges(selection: Blocks) -> list[tuple[KeyRange, ...]]:
    """Return the ranges of keys that any head of any batch item sees, for each block row. Cached too."""
    if "_key_ranges" in selection.__dict__:
        return selection.__dict__["_key_ranges"]
    wide, n_keys = selection.size[1], selection.n_keys
    change = F.pad(selection.blocks.flatten(0, 1).any(0).to(torch.int8), (1, 1)).diff(dim=1)
    found: list[list[KeyRange]] = [[] for _ in range(len(change))]
    begins, ends = ((change == sign).nonzero().tolist() for sign in (1, -1))
    for (row, begin), (_, end) in zip(begins, ends, strict=True):
        found[row].append((begin * wide, min(end * wide, n_keys)))
    selection.__dict__["_key_ranges"] = [tuple(row) for row in found]
    return selection.__dict__["_key_ranges"]


def _union(some: tuple[KeyRange, ...], others: tuple[KeyRange, ...]) -> tuple[KeyRange, ...]:
    joined: list[KeyRange] = []
    for first, end in sorted({*some, *others}):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return tuple(joined)
