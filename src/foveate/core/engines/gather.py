"""Sparse attention by gathering: copy the chosen keys of a few block rows together, then attend to those alone.

Cost and memory follow the number of chosen keys; block rows go in slabs of bounded size. Needs no compiler and has a
backward pass everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.problem import Problem
from foveate.core.selection import Blocks, Indices

#: Elements of gathered keys that one slab may hold: small enough for a cache, large enough to amortise the calls.
SLAB = 1 << 22


def refuses(problem: Problem) -> str | None:
    if not problem.is_plain:
        return "gather computes softmax over dot products only"
    if problem.selection is None:
        return "gather needs a selection"
    if problem.dropout:
        return "gather does not drop weights"
    return None


def attend(problem: Problem) -> Tensor:
    """The output `(B, Hq, Nq, Dv)`."""
    selection = problem.selection
    assert isinstance(selection, Blocks | Indices)
    if problem.causal and isinstance(selection, Blocks):
        selection = selection.causal()
    out = [_slab(problem, selection, rows) for rows in _slabs(problem, selection)]
    return torch.cat(out, 2)[:, :, : problem.n_queries]


def _slabs(problem: Problem, selection: Blocks | Indices) -> Iterator[slice]:
    if isinstance(selection, Blocks):
        n_rows, widest = selection.blocks.shape[2], int(selection.blocks.sum(-1).max()) * selection.size[1]
    else:
        n_rows, widest = selection.indices.shape[2], selection.indices.shape[3]
    b, hq, _, d = problem.q.shape
    step = max(1, SLAB // max(1, b * hq * widest * d))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _slab(problem: Problem, selection: Blocks | Indices, rows: slice) -> Tensor:
    b, hq, nq, d = problem.q.shape
    tall = selection.size[0] if isinstance(selection, Blocks) else selection.group
    index, seen = selection.gathered(rows)
    count, n = index.shape[2], index.shape[3]
    queries = problem.q[:, :, rows.start * tall : min(rows.stop * tall, nq)]
    queries = F.pad(queries, (0, 0, 0, count * tall - queries.shape[2])).reshape(b, hq, count, tall, d)
    k, v = _take(problem, problem.k, index), _take(problem, problem.v, index)
    bias = _mask(problem, index, seen, rows.start * tall)
    out = F.scaled_dot_product_attention(
        queries.reshape(b, hq * count, tall, d), k.reshape(b, hq * count, n, -1), v.reshape(b, hq * count, n, -1),
        bias.expand(b, hq, count, tall, n).reshape(b, hq * count, tall, n), scale=problem.scale,
    )  # fmt: skip
    out = out.reshape(b, hq, count, tall, -1)
    return torch.where(masks.allowed(bias).any(-1, keepdim=True), out, 0.0).flatten(2, 3)


def _take(problem: Problem, x: Tensor, index: Tensor) -> Tensor:
    """Gather `x (B, Hkv, Nk, D)` at `index (B or 1, Hq or 1, R, n)` into `(B, Hq, R, n, D)`."""
    b, hq = problem.q.shape[:2]
    if index.shape[:2] == (1, 1):
        return problem.grouped(x[:, :, index[0, 0].flatten()]).unflatten(2, index.shape[2:])
    batch = torch.arange(b, device=x.device)[:, None, None, None]
    head = torch.arange(hq, device=x.device)[:, None, None] // problem.groups
    return x[batch, head, index.expand(b, hq, *index.shape[2:])]


def _mask(problem: Problem, index: Tensor, seen: Tensor, first: int) -> Tensor:
    """Selection, causality and the caller's mask on the gathered keys: `(B or 1, Hq or 1, R, tall, n)`."""
    b, hq, nq, _ = problem.q.shape
    count, tall = seen.shape[2:4]
    query = torch.arange(first, first + count * tall, device=index.device).reshape(count, tall, 1)
    if problem.causal and isinstance(problem.selection, Indices):
        seen = seen & (index[..., None, :] <= query + problem.n_keys - nq)
    if problem.mask is None:
        return seen
    full = problem.mask.expand(b, hq, nq, problem.n_keys)
    batch = torch.arange(b, device=index.device)[:, None, None, None, None]
    head = torch.arange(hq, device=index.device)[:, None, None, None]
    mine = full[batch, head, query.clamp_max(nq - 1), index[..., None, :]]
    return masks.combine(mine, seen)  # type: ignore[return-value]
