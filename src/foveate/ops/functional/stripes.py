"""Columns and diagonals of attention: their mass in the last queries, the largest of them, and their tiles.

MInference and FlexPrefill choose keys by the attention of a prompt's last queries. A column is a key that many queries
see; a diagonal is a distance at which many queries see. No matrix of all queries and keys is made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

#: Elements of the probe's weights that may be held at a time.
SLAB = 1 << 24


class Mass(NamedTuple):
    """Attention mass of the last queries, on average over them; each of the two sums to 1.

    Args:
        columns: by key `(B, Hq, Nk)`.
        diagonals: by distance `(B, Hq, Nk)`: the number of tokens from the key to the query.
    """

    columns: Float[Tensor, "b h k"]
    diagonals: Float[Tensor, "b h k"]


def finite(x: Tensor) -> Tensor:
    """Return x in float32 at least, with zeros for NaN and inf."""
    return torch.nan_to_num(x.to(torch.promote_types(x.dtype, torch.float32)), 0.0, 0.0, 0.0)


def last_queries(q: Tensor, k: Tensor, count: int, scale: float) -> Mass:
    """Return the mass of the attention of the last `count` queries `q (B, Hq, Nq, D)`, causal, to `k (B, Hkv, Nk, D)`.

    Cost: `count Nk D` for each head, and memory for the weights of a few heads at a time.
    """
    groups, n_keys = q.shape[1] // k.shape[1], k.shape[2]
    last = q[:, :, -count:].unflatten(1, (-1, groups))
    count = last.shape[3]
    step = max(1, SLAB // max(1, q.shape[0] * groups * count * n_keys))
    heads = range(0, k.shape[1], step)
    parts = [_mass(last[:, at : at + step], k[:, at : at + step, None], scale) for at in heads]
    return Mass(*(torch.cat(each, 1).flatten(1, 2) for each in zip(*parts, strict=True)))


def _mass(q: Float[Tensor, "b h g r d"], k: Float[Tensor, "b h 1 k d"], scale: float) -> Mass:
    """Return the mass by key and by distance `(B, H, G, Nk)`.

    The keys run backwards, so that one with number u is `u - back` tokens before a query that has `back` tokens after
    it. Rows that are shifted by one more each then have equal distances below each other.
    """
    rows, n_keys = q.shape[3], k.shape[3]
    logits = ((q * scale).flatten(2, 3) @ k[:, :, 0].flip(2).transpose(2, 3)).unflatten(2, (-1, rows))
    back = torch.arange(rows - 1, -1, -1, device=q.device)
    logits[..., :rows].masked_fill_(torch.arange(min(rows, n_keys), device=q.device) < back[:, None], float("-inf"))
    weights = logits.softmax(-1)
    wide = n_keys + rows - 1
    shifted = F.pad(weights, (0, rows)).flatten(-2)[..., rows - 1 : rows - 1 + rows * wide]
    by_distance = shifted.unflatten(-1, (rows, wide))[..., :n_keys].mean(-2)
    return Mass(weights.mean(-2).flip(-1), by_distance)


def pooled(mass: Float[Tensor, "b h k"], block: int) -> Float[Tensor, "b h n"]:
    """Sum neighbours in blocks; the last block may be short."""
    return F.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def means(x: Float[Tensor, "b h n d"], block: int) -> Float[Tensor, "b h m d"]:
    """Return the mean of each block of tokens; the last block may be short."""
    starts = torch.arange(0, x.shape[2], block, device=x.device)
    sums = F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block)).sum(3)
    return sums / (x.shape[2] - starts).clamp_max(block)[:, None]


def covering(mass: Float[Tensor, "b h k"], share: float) -> Int[Tensor, "b h"]:
    """Return the smallest number of entries whose sum reaches a share of 1; all entries for a share of 1."""
    if share >= 1:
        return torch.full(mass.shape[:-1], mass.shape[-1], device=mass.device)
    reached = mass.sort(-1, descending=True).values.cumsum(-1)
    return ((reached < share).sum(-1) + 1).clamp_max(mass.shape[-1])


def largest(mass: Float[Tensor, "b h n"], count: Int[Tensor, "b h"] | int, forced: int) -> Bool[Tensor, "b h n"]:
    """Return the `count` largest entries of each head; the first `forced` entries come before all others."""
    first = torch.arange(mass.shape[-1], device=mass.device) < forced
    order = mass.masked_fill(first, math.inf).argsort(dim=-1, descending=True, stable=True)
    limit = count[..., None] if isinstance(count, Tensor) else max(count, forced)
    return order.argsort(dim=-1) < limit


def last_own(n_queries: int, n_keys: int, block: int, device: torch.device) -> Int[Tensor, "m 1"]:
    """Return the block of keys that the last query of each block of queries lies in."""
    last = torch.arange(block - 1, n_queries + block - 1, block, device=device)[:, None] + n_keys - n_queries
    return last.clamp_max(n_keys - 1) // block


def tiles_of(
    columns: Bool[Tensor, "b h n"], diagonals: Bool[Tensor, "b h n"], n_queries: int, n_keys: int, block: int
) -> Bool[Tensor, "b h m n"]:
    """Return the causal tiles that hold a pair of the chosen blocks of columns, or of diagonals.

    Block o of the diagonals has the distances from `o block` to `o block + block - 1`. They pass through the tile that
    lies o blocks before the queries' own, and through the one before it; through a third if a call has a past whose
    length is no multiple of `block`.
    """
    key = torch.arange(columns.shape[-1], device=columns.device)
    last = last_own(n_queries, n_keys, block, columns.device)
    first = (torch.arange(0, n_queries, block, device=columns.device)[:, None] + n_keys - n_queries + 1) // block
    chosen = columns[..., None, :].expand(-1, -1, len(last), -1)
    for own in (last, first.minimum(last), first - 1):
        distance = own - key
        chosen = chosen | (diagonals[..., distance.clamp_min(0)] & (distance >= 0))
    return chosen & (key <= last)
