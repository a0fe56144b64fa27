"""The mass of queries on keys with the same label, from the logits of these pairs alone.

Queries and keys of one label are a small block of the matrix. Blocks of about the same size are computed together. On a
text in words these pairs are one or two per cent of all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.host.fused_statistics import Statistics, grouped

#: The largest number of logits that are held at a time, where a row of a block is not longer.
TILE = 1 << 16


def mass_on_equal(
    call: Statistics, asked: Int[Tensor, "b nq"], told: Int[Tensor, "b nk"], excluded: Int[Tensor, " nq"]
) -> Float[Tensor, "b hq nq"]:
    """Return the mass of each query on the keys that have its label, in O(N) memory.

    Args:
        call: the call's statistics; its log-sum-exp is all that is needed.
        asked, told: the labels of queries and keys; negative ones match nothing.
        excluded: the index of a key that does not count for each query; it need not exist.
    """
    total = torch.zeros_like(call.lse)
    for batch in range(len(asked)):
        for rows, keys in _blocks(asked[batch], told[batch]):
            for some_rows, some_keys in _tiles(rows, keys, call.q.shape[1]):
                mass = _mass(call, batch, some_rows, some_keys, excluded)
                real = some_rows >= 0
                total[batch].index_add_(1, some_rows[real], mass[:, real])
    return total


def _blocks(
    asked: Int[Tensor, " nq"], told: Int[Tensor, " nk"]
) -> Iterator[tuple[Int[Tensor, "m w"], Int[Tensor, "m w"]]]:
    """Yield the queries and the keys of each label that both have, labels of about the same count together.

    A row is a label; its lists end with -1.
    """
    labels, number = torch.cat([asked, told]).unique(return_inverse=True)
    of_query, of_key = number[: len(asked)], number[len(asked) :]
    counts = [torch.bincount(of, minlength=len(labels)) for of in (of_query, of_key)]
    both = (counts[0] > 0) & (counts[1] > 0) & (labels >= 0)
    largest = torch.maximum(*counts)
    width = (2.0 ** largest.clamp_min(1).double().log2().ceil()).long()  # the next power of two
    sorts = [of.argsort(stable=True) for of in (of_query, of_key)]
    for size in width[both].unique().tolist():
        chosen = (both & (width == size)).nonzero()[:, 0]
        rows, keys = (_lists(order, count, chosen, size) for order, count in zip(sorts, counts, strict=True))
        yield rows, keys


def _lists(order: Tensor, count: Tensor, chosen: Tensor, size: int) -> Int[Tensor, "m w"]:
    """Return the members of some labels, padded with -1; `order` has the members of all labels one after another."""
    start, place = count.cumsum(0) - count, torch.arange(size, device=order.device)
    found = order[(start[chosen, None] + place).clamp_max(len(order) - 1)]
    return found.masked_fill(place >= count[chosen, None], -1)


def _tiles(
    rows: Int[Tensor, "m w"], keys: Int[Tensor, "m w"], heads: int
) -> Iterator[tuple[Int[Tensor, "n r"], Int[Tensor, "n w"]]]:
    """Split blocks into parts of about `TILE` logits of all heads together."""
    width = keys.shape[1]
    many = max(1, TILE // (heads * width * width))
    few = max(1, TILE // (heads * width)) if many == 1 else width
    for some, same in zip(rows.split(many), keys.split(many), strict=True):
        for part in some.split(few, 1):
            yield part, same


def _mass(
    call: Statistics, batch: int, rows: Int[Tensor, "m r"], keys: Int[Tensor, "m w"], excluded: Int[Tensor, " nq"]
) -> Float[Tensor, "h m r"]:
    """Return the mass of each query of some blocks on the keys of its block."""
    row, key = rows.clamp_min(0), keys.clamp_min(0)
    q, k = call.q[batch][:, row], grouped(call.k[batch][:, key][None], call.q.shape[1])[0]
    logits = call.scale * q @ k.mT
    seen = (rows >= 0)[:, :, None] & (keys >= 0)[:, None] & (key[:, None] != excluded[row][:, :, None])
    if call.causal:
        seen = seen & (key[:, None] <= row[:, :, None] + call.k.shape[2] - call.q.shape[2])
    seen = seen & call.counted[batch, 0][row][:, :, None]
    if call.key_mask is not None:
        seen = seen & call.key_mask[batch][key][:, None]
    return torch.where(seen, (logits - call.lse[batch][:, row][..., None]).exp(), 0.0).sum(-1)
