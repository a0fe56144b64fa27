"""Sparse attention by slices: the fused kernel on each run of query rows and on the ranges of keys that it sees.

A run's keys are a view of the caller's if they form one range, as in a window; several ranges are copied together. Each
head gets the keys that any head sees, and a bias hides the rest. `pairs` counts that overhead, and `auto` gathers
instead if heads differ much, or if each head can be computed by itself (`tiles`). Nothing is compiled, and the backward
pass works on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.readable import known
from foveate.core.selection import Blocks

#: Queries up to which short tiles are joined for one call of the kernel, and the number below which to gather.
TALL, FEW = 128, 16
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
    """

    rows: slice
    queries: slice
    keys: tuple[KeyRange, ...]
    seen: Tensor | None = None


def refuses(call: AttentionCall) -> str | None:
    if not call.is_plain:
        return "slices computes softmax over dot products only"
    if not isinstance(call.selection, Blocks):
        return "slices needs a selection of blocks"
    if call.dropout:
        return "slices does not drop weights"
    return None


def pairs(selection: Blocks, causal: bool) -> int:
    """Count the (query, key) pairs in the slices of one head."""
    runs = _joined(selection.without_future if causal else selection)
    return sum((run.queries.stop - run.queries.start) * _length(run.keys) for run in runs)


def attend(call: AttentionCall) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    assert isinstance(call.selection, Blocks)
    selection = call.selection.without_future if call.causal else call.selection
    runs = _runs(selection)
    queries = call.q.split([run.queries.stop - run.queries.start for run in runs], 2)
    keys, values = _Cut(call.k, runs, call.wants_grad), _Cut(call.v, runs, call.wants_grad)
    out, bias = [], _Bias(call, selection)
    for q, run in zip(queries, runs, strict=True):
        if not run.keys:
            out.append(q.new_zeros(*q.shape[:3], call.v.shape[3]))
            continue
        added, sees = bias.of(run)
        y = F.scaled_dot_product_attention(
            q, keys.of(run), values.of(run), added, scale=call.scale, enable_gqa=call.groups > 1
        )
        out.append(y if sees is None else torch.where(sees, y, 0.0))
    return torch.cat(out, 2)


class _Cut:
    """Keys or values that runs cut their ranges from."""

    def __init__(self, x: Tensor, runs: Sequence[RowRun], wants_grad: bool) -> None:
        self.x = x
        self.pieces: Sequence[Tensor] | None = None
        if wants_grad:
            # cut once at the ends of all ranges: a slice for each run would return a gradient as large as x for each
            ends = sorted({0, x.shape[2], *(end for run in runs for range_ in run.keys for end in range_)})
            self.ends = {end: index for index, end in enumerate(ends)}
            self.pieces, self.ends = (
                x.split([b - a for a, b in pairwise(ends)], 2),
                {end: i for i, end in enumerate(ends)},
            )
        else:  # allocating memory for each run would cost more than the copy
            longest = max((_length(run.keys) for run in runs if len(run.keys) > 1), default=0)
            self.room = x.new_empty(*x.shape[:2], longest, x.shape[3])

    def of(self, run: RowRun) -> Tensor:
        if self.pieces is not None:
            parts = [part for a, b in run.keys for part in self.pieces[self.ends[a] : self.ends[b]]]
            return torch.cat(parts, 2)
        parts = [self.x[:, :, first:end] for first, end in run.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2, out=self.room[:, :, : _length(run.keys)])


def _runs(selection: Blocks) -> list[RowRun]:
    """Return the runs, cached on the selection since static selections are used again and again."""
    found = selection.__dict__.get("_runs")
    if found is None:
        found = selection.__dict__["_runs"] = _with_shared(selection, _joined(selection))
    return found


def _with_shared(selection: Blocks, runs: list[RowRun]) -> list[RowRun]:
    """Drop keys that no query of a run sees, and store the visible pairs where neighbouring runs agree."""
    found: list[RowRun] = []
    before: Tensor | None = None
    for run in runs:
        run, seen = _trimmed(selection, run)
        if before is not None and seen is not None and seen.shape == before.shape and torch.equal(seen, before):
            seen, found[-1], run = before, found[-1]._replace(seen=before), run._replace(seen=before)
        found.append(run)
        before = seen
    return found


def _trimmed(selection: Blocks, run: RowRun) -> tuple[RowRun, Tensor | None]:
    """Cut unseen keys from the ends of ranges and from long gaps; return the run and a mask of the pairs that count."""
    if (seen := _seen(selection, run)) is None:
        return run, None
    places = _positions(run, seen.device)[seen.flatten(0, 2).any(0)]
    gaps = (places.diff() > GAP).nonzero().flatten().tolist()
    firsts, lasts = [0, *(gap + 1 for gap in gaps)], [*gaps, len(places) - 1]
    keys = tuple((int(places[a]), int(places[b]) + 1) for a, b in zip(firsts, lasts, strict=True) if len(places))
    if keys != run.keys:
        run = run._replace(keys=keys)
        seen = _seen(selection, run)
    return run, seen


def _seen(selection: Blocks, run: RowRun) -> Tensor | None:
    if not run.keys:
        return None
    seen = selection.seen(run.rows, _positions(run, selection.blocks.device))
    return None if seen is None else seen[:, :, : run.queries.stop - run.queries.start]


def _positions(run: RowRun, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, end, device=device) for first, end in run.keys])


def _joined(selection: Blocks) -> list[RowRun]:
    """Return block rows as runs: short ones are joined, and any that see the same keys. Cached as well."""
    if (remembered := selection.__dict__.get("_joined")) is not None:
        return remembered
    tall, first, seen = selection.size[0], 0, None
    found: list[RowRun] = []
    for row, ranges in enumerate(_key_ranges(selection)):
        both = ranges if seen is None else _union(seen, ranges)
        if seen is not None and (row + 1 - first) * tall > TALL and not seen == ranges == both:
            found.append(_run(selection, first, row, seen))
            first, both = row, ranges
        seen = both
    if seen is not None:
        found.append(_run(selection, first, selection.blocks.shape[2], seen))
    selection.__dict__["_joined"] = found
    return found


def _run(selection: Blocks, first: int, end: int, keys: tuple[KeyRange, ...]) -> RowRun:
    tall = selection.size[0]
    return RowRun(slice(first, end), slice(first * tall, min(end * tall, selection.n_queries)), keys)


def _key_ranges(selection: Blocks) -> list[tuple[KeyRange, ...]]:
    """Return the ranges of keys that any head of any batch item sees, for each block row."""
    wide, n_keys = selection.size[1], selection.n_keys
    change = F.pad(selection.blocks.flatten(0, 1).any(0).to(torch.int8), (1, 1)).diff(dim=1)
    found: list[list[KeyRange]] = [[] for _ in range(len(change))]
    begins, ends = ((change == sign).nonzero().tolist() for sign in (1, -1))
    for (row, begin), (_, end) in zip(begins, ends, strict=True):
        found[row].append((begin * wide, min(end * wide, n_keys)))
    return [tuple(row) for row in found]


def _union(some: tuple[KeyRange, ...], others: tuple[KeyRange, ...]) -> tuple[KeyRange, ...]:
    joined: list[KeyRange] = []
    for first, end in sorted({*some, *others}):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return tuple(joined)


def _length(keys: tuple[KeyRange, ...]) -> int:
    return sum(end - first for first, end in keys)


class _Bias:
    """The bias that the kernel adds to the logits of a run; neighbours that see the same pairs share one."""

    def __init__(self, call: AttentionCall, selection: Blocks) -> None:
        self.call, self.selection = call, selection
        self.seen: Tensor | None = None
        self.made: tuple[Tensor | None, Tensor | None] = None, None

    def of(self, run: RowRun) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias (None if it is zero) and a mask of the queries that see some key (None if all do)."""
        if run.seen is None or self.call.mask is not None:
            return self._made(run)
        if self.seen is not run.seen:
            self.seen, self.made = run.seen, self._made(run)
        return self.made

    def _made(self, run: RowRun) -> tuple[Tensor | None, Tensor | None]:
        mine = masks.rows_of(self.call.mask, run.queries)
        if mine is not None and mine.dim() and mine.shape[-1] > 1:
            mine = mine[..., _positions(run, mine.device)]
        mask = masks.combine(mine, run.seen if run.seen is not None else _seen(self.selection, run))
        if mask is None:
            return None, None
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        sees = masks.allowed(mask).any(-1, keepdim=True)
        return masks.as_bias(mask, self.call.q.dtype), None if known(sees.all()) else sees
