"""Sparse attention by slices: the fused kernel on each run of query rows and on the ranges of keys that it sees.

A run's keys are a view of the caller's if they form one range, as in a window; several ranges are copied together. Each
head gets the keys that any head sees, and a bias hides the rest; runs of a sliding window share a call. `work` counts
all this, and `auto` gathers instead where that is predicted to be faster. Nothing is compiled, and the backward pass
works on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines import runs as planning
from foveate.core.engines.runs import RowRun, Series
from foveate.core.engines.work import RULE, Work
from foveate.core.readable import known
from foveate.core.selection import Blocks

#: Queries below which to gather.
FEW = 16


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
    return sum(run.pairs for run in planning.rows(selection.without_future if causal else selection))


def work(call: AttentionCall) -> Work:
    """Return the work of a call.

    A run whose keys lie around its queries as those of the run before shares its mask. For a selection that is new, the
    ranges are not cut yet, and every mask is made twice more, to cut them and to compare it with the next.
    """
    assert isinstance(call.selection, Blocks)
    selection = call.selection.without_future if call.causal else call.selection
    (b, hq, _, d), hkv, dv = call.q.shape, call.k.shape[1], call.v.shape[3]
    is_new = not call.selection.comes_again
    series = planning.untrimmed(selection, _are_alone(call)) if is_new else planning.plan(selection, _are_alone(call))
    runs = [run for each in series for run in each if run.keys]
    places = [_places(run) for run in runs]
    own = [run for run, place, before in zip(runs, places, [None, *places], strict=False) if place != before]
    pairs = sum(run.pairs for run in runs)
    masked = sum(run.pairs for run in own) + 2 * pairs * is_new
    hides = selection.rule is not None or selection.blocks.shape[1] > 1
    passes = RULE if call.selection.rule is not None else int(hides)
    return Work(
        calls=sum(bool(each[0].keys) for each in series),
        products=b * hq * pairs * (d + dv),
        copied=b * hkv * sum(planning.length(run.keys) for run in runs if len(run.keys) > 1) * (d + dv),
        masked=masked * selection.blocks.shape[:2].numel() * passes,
        planned=len(runs) * is_new,
    )


def attend(call: AttentionCall) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    assert isinstance(call.selection, Blocks)
    selection = call.selection.without_future if call.causal else call.selection
    plan = planning.plan(selection, _are_alone(call))
    queries = call.q.split([series[-1].queries.stop - series[0].queries.start for series in plan], 2)
    alone = [series[0] for series in plan if len(series) == 1]
    keys, values = _Cut(call.k, alone, call.wants_grad), _Cut(call.v, alone, call.wants_grad)
    out, bias = [], _Bias(call, selection)
    for q, series in zip(queries, plan, strict=True):
        run = series[0]
        if not run.keys:
            out.append(q.new_zeros(*q.shape[:3], call.v.shape[3]))
            continue
        added, sees = bias.of(run)
        if len(series) > 1:
            out.append(_slide(call, q, series, added, sees))
            continue
        y = F.scaled_dot_product_attention(
            q, keys.of(run), values.of(run), added, scale=call.scale, enable_gqa=call.groups > 1
        )
        out.append(y if sees is None else torch.where(sees, y, 0.0))
    return torch.cat(out, 2)


def _are_alone(call: AttentionCall) -> bool:
    """Return whether no runs are joined to a series: a mask differs from run to run, and the gradient of overlapping
    views costs more than a series saves."""
    return call.mask is not None or call.wants_grad


def _places(run: RowRun) -> tuple[int, ...]:
    """Return the number of queries, and where the last range of keys lies from the first query on."""
    first = run.queries.start
    return run.queries.stop - first, planning.length(run.keys), *(end - first for end in run.keys[-1])


def _slide(call: AttentionCall, q: Tensor, series: Series, added: Tensor | None, sees: Tensor | None) -> Tensor:
    """Attend all runs of a series in one call, whose heads are the runs; their keys are overlapping views."""
    count, (batch, heads, groups) = len(series), (call.q.shape[0], call.k.shape[1], call.groups)
    (first, end), step = series[0].keys[0], planning.step(series)

    def windows(x: Tensor) -> Tensor:
        return x[:, :, first : series[-1].keys[0][1]].flatten(0, 1).unfold(1, end - first, step).mT

    # the query heads of a group are more rows, so that no key is copied for them
    rows = q.unflatten(1, (heads, groups)).unflatten(3, (count, -1)).transpose(2, 3)
    bias = None if added is None else added.repeat(1, 1, groups, 1)
    y = F.scaled_dot_product_attention(
        rows.flatten(3, 4).flatten(0, 1), windows(call.k), windows(call.v), bias, scale=call.scale
    )
    y = y.unflatten(0, (batch, heads)).unflatten(3, (groups, -1))
    y = y if sees is None else torch.where(sees, y, 0.0)
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)


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
            longest = max((planning.length(run.keys) for run in runs if len(run.keys) > 1), default=0)
            self.room = x.new_empty(*x.shape[:2], longest, x.shape[3])

    def of(self, run: RowRun) -> Tensor:
        if self.pieces is not None:
            parts = [part for a, b in run.keys for part in self.pieces[self.ends[a] : self.ends[b]]]
            return torch.cat(parts, 2)
        parts = [self.x[:, :, first:end] for first, end in run.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2, out=self.room[:, :, : planning.length(run.keys)])


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
            mine = mine[..., planning.positions(run, mine.device)]
        mask = masks.combine(mine, run.seen if run.seen is not None else planning.seen(self.selection, run))
        if mask is None:
            return None, None
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        sees = masks.allowed(mask).any(-1, keepdim=True)
        return masks.as_bias(mask, self.call.q.dtype), None if known(sees.all()) else sees
