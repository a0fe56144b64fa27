"""Attention inside groups: some queries and some keys, gathered from anywhere in the sequence.

Operators that sort tokens or assign them to clusters state their choice as positions: `queries (B, Hq, ..., c)` and
`keys (B, Hq, ..., n)`, in which the axes between are groups. Each query of a group is compared with each key of the
group, and with no other. No tensor of size `Nq x Nk` is made.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines.gather import taken
from foveate.core.readable import known


def gathered(x: Float[Tensor, "b hkv n d"], index: Int[Tensor, "b hq *g"]) -> Float[Tensor, "b hq *g d"]:
    """Return the rows of `x` at positions; each group of query heads reads its own head of `x`."""
    heads = x.shape[1]
    flat = index.unflatten(1, (heads, -1)).flatten(2)
    (rows,) = taken(flat, x)
    return rows.reshape(*index.shape, x.shape[3])


def mask_at(mask: Tensor | None, queries: Int[Tensor, "... c"], keys: Int[Tensor, "... n"]) -> Tensor | None:
    """Return a call's mask for the pairs of groups, `(B or 1, H or 1, ..., c or 1, n or 1)`, or None without one.

    Positions beyond the end of the mask read its last row or column.
    """
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    trailing = (1,) * (queries.dim() - 1)
    places: list[Tensor] = [torch.arange(mask.shape[0], device=mask.device).reshape(-1, 1, *trailing)]
    places.append(torch.arange(mask.shape[1], device=mask.device).reshape(-1, *trailing))
    for axis, index in ((2, queries[..., None]), (3, keys[..., None, :])):
        last = mask.shape[axis] - 1
        places.append(index.clamp_max(last) if last else index.new_zeros((1,) * index.dim()))
    return mask[tuple(places)]


def hide(logits: Float[Tensor, "..."], mask: Tensor | None) -> Float[Tensor, "..."]:
    """Put -inf where a bool mask is False, or add a float bias."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask, masks.NEG_INF) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)


def attend(
    call: AttentionCall, queries: Int[Tensor, "b h g c"], keys: Int[Tensor, "b h g n"], mask: Tensor | None,
    is_causal: bool = False,
) -> tuple[Float[Tensor, "b h g c dv"], Tensor | None]:  # fmt: skip
    """Return the softmax attention of each group by the fused kernel, and which of its queries see a key.

    Args:
        call: a checked call; its mask, causality and selection are not read.
        queries, keys: positions.
        mask: the pairs that count, `(B or 1, H or 1, G, c or 1, n)`; None for all.
        is_causal: True = the i-th query of a group sees the first i + 1 keys; only without a mask.
    """
    q, k, v = gathered(call.q, queries), gathered(call.k, keys), gathered(call.v, keys)
    shape = q.shape[:4]
    if mask is not None:
        mask = mask.expand(*shape[:3], *mask.shape[3:])
        mask = (mask if mask.dtype == torch.bool else mask.to(q.dtype)).flatten(1, 2)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=call.scale).unflatten(1, shape[1:3])
    if mask is None:
        return out, None
    sees = masks.allowed(mask).any(-1).unflatten(1, shape[1:3]).expand(shape)
    return (out if known(sees.all()) else torch.where(sees[..., None], out, 0.0)), sees


def mean(
    out: Float[Tensor, "b h g c dv"], queries: Int[Tensor, "b h g c"], counted: Tensor | None, n_queries: int
) -> Float[Tensor, "b h n dv"]:
    """Return each query's mean over the groups that it is in, or over those that count; zeros for none."""
    wide = torch.promote_types(out.dtype, torch.float32)
    index = queries.flatten(2)[..., None]
    ones = torch.ones_like(queries, dtype=wide) if counted is None else counted.to(wide)
    both = torch.cat([out.to(wide), ones[..., None]], -1).flatten(2, 3)
    total = both.new_zeros(*both.shape[:2], n_queries, both.shape[3]).scatter_add(2, index.expand_as(both), both)
    return (total[..., :-1] / total[..., -1:].clamp_min(1.0)).to(out.dtype)
