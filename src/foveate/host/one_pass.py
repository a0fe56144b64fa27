"""Statistics of softmax attention on a CPU: one pass over the logits, a tile at a time, each read from the cache.

PyTorch's fused kernel gives a row's log-sum-exp, and other statistics only as values: a pass for each, with a product
that nobody needs. Here the logits of some rows are computed once, and every statistic is a reduction of the tile. On
one thread of a CPU this takes about two thirds of the time; on two threads it takes a fifth more than the kernel, and
on a GPU far more, since the kernel never writes a logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.masks import NEG_INF

#: Logits of a tile: half a megabyte in float32, which most processors hold close by.
TILE = 1 << 17
_HIDDEN = -1e30  # finite, so that a row without a key has no NaN


@dataclass(frozen=True, eq=False)
class RowsAndColumns:
    """The statistics of a call.

    Args:
        lse: each query's log-sum-exp; -inf without a key.
        mean_logit: each query's mean logit under its weights; 0 without a key.
        mean_key: each query's mean key index under its weights; 0 without a key.
        received: the mass that each key receives from the queries that count.
    """

    lse: Float[Tensor, "b hq nq"]
    mean_logit: Float[Tensor, "b hq nq"]
    mean_key: Float[Tensor, "b hq nq"]
    received: Float[Tensor, "b hq nk"]


def one_pass(
    q: Float[Tensor, "b hq nq d"], k: Float[Tensor, "b hkv nk d"], *, scale: float, causal: bool,
    key_mask: Bool[Tensor, "b nk"] | None = None, query_mask: Bool[Tensor, "b nq"] | None = None,
) -> RowsAndColumns:  # fmt: skip
    """Compute all statistics of a call, in O(N) memory; see `foveate.host.fused_statistics.statistics`."""
    (b, h, n), (hkv, m) = q.shape[:3], k.shape[1:3]
    grouped, keys, past = (q * scale).unflatten(1, (hkv, -1)), k.mT, m - n
    rows = [q.new_empty(b, hkv, h // hkv, n) for _ in range(3)]
    received, places = q.new_zeros(b, hkv, h // hkv, m), torch.arange(m, dtype=q.dtype, device=q.device)
    for batch in range(b):
        hidden = None if key_mask is None else ~key_mask[batch]
        for head in range(hkv):
            for start, stop in _spans(n, h // hkv, past, m, causal):
                seen = past + stop if causal else m
                x = grouped[batch, head, :, start:stop].flatten(0, 1) @ keys[batch, head, :, :seen]
                x = x.unflatten(0, (-1, stop - start))
                if causal:
                    x[..., past + start :].masked_fill_(_later(stop - start, q.device), _HIDDEN)
                if hidden is not None:
                    x.masked_fill_(hidden[:seen], _HIDDEN)
                found, columns = _reduced(x, places[:seen])
                for row, value in zip(rows, found, strict=True):
                    row[batch, head, :, start:stop] = value
                counted = None if query_mask is None else query_mask[batch, start:stop]
                received[batch, head, :, :seen] += columns(counted)
    lse, logit, key = (row.flatten(1, 2) for row in rows)
    return RowsAndColumns(lse, logit, key, received.flatten(1, 2))


def _spans(n: int, group: int, past: int, m: int, causal: bool) -> list[tuple[int, int]]:
    """Split the queries so that a tile of a group's heads has about `TILE` logits, and at least 8 rows."""
    spans, start, size = list[tuple[int, int]](), 0, TILE / group
    while start < n:
        before = past + start
        rows = (
            (math.sqrt(before * before + 4 * size) - before) / 2 if causal else size / m
        )  # rows * (before + rows) = size
        spans.append((start, min(n, start + max(8, int(rows)))))
        start = spans[-1][1]
    return spans


def _later(rows: int, device: torch.device) -> Bool[Tensor, "r r"]:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)


def _reduced(
    x: Float[Tensor, "g r s"], places: Float[Tensor, " s"]
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Tensor | None], Tensor]]:
    """Return the rows' statistics of a tile of logits, and a function that gives the columns' sums."""
    top = x.amax(-1, keepdim=True)
    weights = (x - top).exp_()
    total = weights.sum(-1)
    empty = top[..., 0] <= _HIDDEN / 2
    share = total.reciprocal().masked_fill_(empty, 0.0)
    lse = (top[..., 0] + total.log()).masked_fill_(empty, NEG_INF)

    def columns(counted: Bool[Tensor, " r"] | None) -> Float[Tensor, "g s"]:
        kept = share if counted is None else share * counted
        return (kept[:, None] @ weights)[:, 0]

    return (lse, torch.linalg.vecdot(weights, x) * share, (weights @ places) * share), columns
