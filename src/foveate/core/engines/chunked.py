"""Exact attention in O(N) memory, forward and backward, for any scoring.

Queries go in chunks. A softmax meets the keys tile by tile and merges partial results online; any other normaliser sees
whole rows of a chunk. Each chunk is recomputed in the backward pass, so that no `Nq x Nk` matrix is ever kept.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial as bind

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.core import masks, online
from foveate.core.engines import reference
from foveate.core.problem import Problem

QUERIES, KEYS = 128, 1024


def refuses(problem: Problem) -> str | None:
    if problem.dropout and problem.scoring.is_softmax:
        return "chunked cannot drop weights of a softmax that it merges online"
    return None


def attend(problem: Problem, queries: int = QUERIES, keys: int = KEYS) -> Tensor:
    """The output `(B, Hq, Nq, Dv)`, in chunks of `queries` rows and tiles of `keys` columns."""
    whole_rows = not problem.scoring.is_softmax or problem.has_hidden_garbage()
    recompute = _needs_grad(problem)
    out = []
    for start in range(0, problem.n_queries, queries):
        rows = slice(start, min(start + queries, problem.n_queries))
        run = bind(_whole_rows, problem, rows) if whole_rows else bind(_merged_rows, problem, rows, keys)
        if recompute:
            out.append(checkpoint(run, problem.q[:, :, rows], problem.k, problem.v, use_reentrant=False))
        else:
            out.append(run(problem.q[:, :, rows], problem.k, problem.v))
    return torch.cat(out, 2)


def _needs_grad(problem: Problem) -> bool:
    """Whether anything that a chunk is computed from wants a gradient: then chunks are computed again, not kept."""
    parameters = getattr(problem.scoring, "parameters", tuple)
    inputs = (problem.q, problem.k, problem.v, problem.mask, *parameters())
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _visible(problem: Problem, rows: slice) -> int:
    return problem.n_keys - problem.n_queries + rows.stop if problem.causal else problem.n_keys


def _whole_rows(problem: Problem, rows: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk of whole rows, for a normaliser that needs them and for keys that must be masked value by value."""
    visible = _visible(problem, rows) if problem.scoring.is_softmax else problem.n_keys
    return reference.attend(replace(problem, k=k, v=v), rows, slice(0, visible))


def _merged_rows(problem: Problem, rows: slice, keys: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk of queries against the keys that it can see, tile by tile; `q` is already cut."""
    visible = _visible(problem, rows)
    part: online.Partial | None = None
    tiles = zip(k[:, :, :visible].split(keys, 2), v[:, :, :visible].split(keys, 2), strict=True)
    for index, (tile_k, tile_v) in enumerate(tiles):
        cols = slice(index * keys, index * keys + tile_k.shape[2])
        logits = problem.scoring.logits(q, problem.grouped(tile_k), problem.scale, problem.tile(rows, cols))
        mask = _mask(problem, rows, cols)
        if mask is not None:
            if mask.dtype != torch.bool:
                logits = logits + mask
            logits = logits.masked_fill(~masks.allowed(mask), masks.NEVER)
        new = online.partial(logits, problem.grouped(tile_v))
        part = new if part is None else online.merge(part, new)
    assert part is not None
    return online.finish(part).to(v.dtype)


def _mask(problem: Problem, rows: slice, cols: slice) -> Tensor | None:
    """The tile's mask; causality costs nothing on tiles that lie wholly in the past."""
    first = problem.n_keys - problem.n_queries + rows.start
    if problem.causal and cols.stop - 1 <= first:
        return replace(problem, causal=False).tile_mask(rows, cols)
    return problem.tile_mask(rows, cols)
