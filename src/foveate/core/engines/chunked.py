"""Exact attention in O(N) memory, forward and backward, for any scoring.

The engine processes queries in chunks. A softmax reads the keys tile by tile and merges partial results online; any
other normalizer sees whole rows of a chunk. The backward pass recomputes tiles and adds their gradients up in place, so
that nothing of size `Nq x Nk` is ever kept. It cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.core import masks, online_softmax
from foveate.core.call import AttentionCall
from foveate.core.engines import reference
from foveate.core.errors import UnsupportedEngine
from foveate.core.selection import Blocks

QUERIES, KEYS = 128, 1024


class Tiling(NamedTuple):
    queries: int
    keys: int
    whole: bool  # a chunk sees whole rows if the normalizer needs them, or if keys must be masked value by value


def refuses(call: AttentionCall) -> str | None:
    if call.dropout:
        return "chunked computes weights again in the backward pass and cannot drop any"
    return None


def attend(call: AttentionCall, queries: int | None = None, keys: int | None = None) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`, computed in chunks of `queries` rows and tiles of `keys` columns.

    None takes the call's own, if it has any.
    """
    own = call.chunk or (QUERIES, KEYS)
    queries, keys = queries or own[0], keys or own[1]
    tiling = Tiling(queries, keys, not call.scoring.is_softmax or (call.hides_keys and call.has_garbage()))
    inputs = (call.q, call.k, call.v, call.mask, *_parameters(call))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Chunked.apply(call, tiling, *inputs)
    return _forward(call, tiling)[0]


def _parameters(call: AttentionCall) -> tuple[Tensor, ...]:
    return tuple(getattr(call.scoring, "parameters", tuple)())


def _chunks(call: AttentionCall, tiling: Tiling) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each chunk and the range of keys that they may see."""
    for start in range(0, call.n_queries, tiling.queries):
        rows = slice(start, min(start + tiling.queries, call.n_queries))
        seen = call.n_keys - call.n_queries + rows.stop if call.causal else call.n_keys
        yield rows, _between(call, rows, seen if call.scoring.is_softmax else call.n_keys)


def _between(call: AttentionCall, rows: slice, seen: int) -> slice:
    """Return the range of the first `seen` keys without those that a selection of blocks leaves out at either end."""
    selection = call.selection
    if isinstance(selection, Blocks):
        tall, wide = selection.size
        chosen = selection.blocks[:, :, rows.start // tall : -(-rows.stop // tall)].flatten(0, 2).any(0).nonzero()
        if len(chosen):
            first, last = int(chosen[0]) * wide, min(int(chosen[-1] + 1) * wide, seen)
            return slice(first, last) if first < last else slice(0, seen)
    return slice(0, seen)


def _tiles(seen: slice, tiling: Tiling) -> Iterator[slice]:
    starts = range(seen.start, seen.stop, tiling.keys)
    return (slice(start, min(start + tiling.keys, seen.stop)) for start in starts)


def _forward(call: AttentionCall, tiling: Tiling) -> tuple[Tensor, Tensor | None]:
    """Return the output and, where tiles are merged, the log-sum-exp of each row."""
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
    if tiling.whole:
        for rows, seen in _chunks(call, tiling):
            out[:, :, rows] = reference.attend(call, rows, seen)
        return out, None
    sums = out.new_empty(*out.shape[:3], 1, dtype=torch.promote_types(out.dtype, torch.float32))
    for rows, seen in _chunks(call, tiling):
        part: online_softmax.Partial | None = None
        for cols in _tiles(seen, tiling):
            logits = _logits(call, call.q[:, :, rows], call.k[:, :, cols], None, rows, cols)
            new = online_softmax.partial(logits, call.grouped(call.v[:, :, cols]), inplace=call.is_plain)
            del logits  # one tile at a time, not two
            part = new if part is None else online_softmax.merge(part, new)
        assert part is not None
        out[:, :, rows], sums[:, :, rows] = (
            online_softmax.finish(part).to(out.dtype),
            online_softmax.log_sum_exp(part)[..., None],
        )
    return out, sums


def _logits(call: AttentionCall, q: Tensor, k: Tensor, mine: Tensor | None, rows: slice, cols: slice) -> Tensor:
    """Return the masked logits of a tile. `mine`: the caller's mask for the tile, if the mask needs a gradient."""
    logits = call.scoring.logits(q, call.grouped(k), call.scale, call.tile(rows, cols))
    first = call.n_keys - call.n_queries + rows.start
    if call.causal and cols.stop - 1 <= first:
        call = replace(call, causal=False)  # the tile lies in the past: causality hides nothing
    mask = call.tile_mask(rows, cols, mine)
    if mask is None:
        return logits
    if mask.dtype != torch.bool:
        logits = logits + mask
    return logits.masked_fill(~masks.allowed(mask), masks.NEG_INF)


class _Chunked(torch.autograd.Function):
    """Differentiate by recomputation, from q, k, v, the mask, the scoring's parameters, the output and log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, call: AttentionCall, tiling: Tiling, *inputs: Tensor | None) -> Tensor:
        out, sums = _forward(call, tiling)
        ctx.call, ctx.tiling = call, tiling
        ctx.save_for_backward(*inputs, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, sums = ctx.saved_tensors
        parameters = _parameters(ctx.call)
        if [p.data_ptr() for p in parameters] != [p.data_ptr() for p in inputs[4:]]:
            raise UnsupportedEngine('engine="chunked" needs the parameters of its forward pass again; use "reference"')
        q, k, v, mask = (None if x is None else x.detach() for x in inputs[:4])
        call = replace(ctx.call, q=q, k=k, v=v, mask=mask)
        totals = Totals([q, k, v, mask, *parameters], ctx.needs_input_grad[2:])
        for rows, seen in _chunks(call, ctx.tiling):
            if sums is None:
                _whole_backward(call, totals, rows, seen, grad[:, :, rows])
            else:
                part = grad[:, :, rows], out[:, :, rows], sums[:, :, rows]
                _merged_backward(call, totals, rows, _tiles(seen, ctx.tiling), *part)
        return None, None, *totals.finished()


def _whole_backward(call: AttentionCall, totals: Totals, rows: slice, cols: slice, grad: Tensor) -> None:
    """Differentiate a chunk of whole rows by autograd."""
    leaves = totals.leaves(rows, cols, whole=True)
    q, k, v, mine, *_ = leaves
    assert q is not None and k is not None and v is not None
    with torch.enable_grad():
        out = reference.attend(replace(call, q=q, k=k, v=v), rows, cols, mine)
    totals.add(out, leaves, grad, rows, cols, whole=True)


def _merged_backward(
    call: AttentionCall, totals: Totals, rows: slice, tiles: Iterator[slice], grad: Tensor, out: Tensor, sums: Tensor
) -> None:
    """Differentiate a chunk under a softmax tile by tile; the log-sum-exp gives the weights.

    Autograd differentiates the logits, unless they are plain dot products: those take two products and less memory.
    """
    wide = sums.dtype
    mean = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    sums = sums.masked_fill(sums == masks.NEG_INF, 0.0)
    by_hand = call.is_plain and totals.mask is None
    for cols in tiles:
        leaves = totals.leaves(rows, cols)
        q, k, _, mine, *_ = leaves
        assert q is not None and k is not None
        with torch.set_grad_enabled(not by_hand):
            logits = _logits(call, q, k, mine, rows, cols).to(wide)
        weights = (logits.sub_(sums) if by_hand else logits.detach() - sums).exp_()
        v = call.v[:, :, cols]
        if totals.v is not None:
            totals.v[:, :, cols] += _per_kv_head(weights.to(grad.dtype).transpose(-1, -2) @ grad, v)
        towards = (grad @ call.grouped(v).transpose(-1, -2)).to(wide).sub_(mean).mul_(weights)
        if by_hand:
            _add_products(call, totals, towards.to(q.dtype), rows, cols)
        else:
            totals.add(logits, leaves, towards, rows, cols)
        del logits, weights, towards  # free the memory before the next tile allocates as much


def _add_products(call: AttentionCall, totals: Totals, slope: Tensor, rows: slice, cols: slice) -> None:
    """Add the gradients of q and k that follow from that of a tile's scaled dot products."""
    q, k = call.q[:, :, rows], call.k[:, :, cols]
    if totals.q is not None:
        totals.q[:, :, rows] += (slope @ call.grouped(k)) * call.scale
    if totals.k is not None:
        totals.k[:, :, cols] += _per_kv_head(slope.transpose(-1, -2) @ (q * call.scale), k)


def _per_kv_head(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the query heads of each key/value head."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2)


class Totals:
    """The running sums of the gradients of q, k, v, the mask and the parameters, in float32 at least.

    Attributes:
        q, k, v, mask: the sums of these; None where no gradient is needed.
    """

    def __init__(self, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self.tensors, self.needed = tensors, needed
        self.sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if x is not None and need else None
            for x, need in zip(tensors, needed, strict=True)
        ]
        self.q, self.k, self.v, self.mask = self.sums[:4]

    def leaves(self, rows: slice, cols: slice, whole: bool = False) -> list[Tensor | None]:
        """Return the inputs of a tile, detached from the graph: parts of q, k, v and the mask, and the parameters.

        `whole`: return q, k and v uncut, for a caller that cuts them.
        """
        parts = self._parts(self.tensors, rows, cols, whole)
        fresh = [None if x is None else x.detach().requires_grad_(n) for x, n in zip(parts, self.needed, strict=False)]
        return [*fresh, *self.tensors[4:]]

    def add(
        self, out: Tensor, leaves: Sequence[Tensor | None], grad: Tensor, rows: slice, cols: slice, whole: bool = False
    ) -> None:
        """Differentiate `out` by the leaves that need a gradient, and add the gradients to the sums."""
        targets = [*self._parts(self.sums, rows, cols, whole), *self.sums[4:]]
        pairs = [(leaf, to) for leaf, to in zip(leaves, targets, strict=True) if leaf is not None and to is not None]
        if not pairs or not out.requires_grad:
            return
        found = torch.autograd.grad(out, [leaf for leaf, _ in pairs], grad, allow_unused=True)
        for (_, to), extra in zip(pairs, found, strict=True):
            if extra is not None:
                to += extra

    def finished(self) -> list[Tensor | None]:
        pairs = zip(self.sums, self.tensors, strict=True)
        return [None if total is None or x is None else total.to(x.dtype) for total, x in pairs]

    @staticmethod
    def _parts(tensors: Sequence[Tensor | None], rows: slice, cols: slice, whole: bool) -> list[Tensor | None]:
        q, k, v, mask = tensors[:4]
        cuts = (q, rows), (k, cols), (v, cols)
        parts = [x if x is None or whole else x[:, :, at] for x, at in cuts]
        return [*parts, masks.columns_of(masks.rows_of(mask, rows), cols)]
