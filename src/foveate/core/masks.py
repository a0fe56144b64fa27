"""Functions on masks.

A mask is a bool tensor (True = may attend) or a float bias that is added to the logits; both broadcast to
`(B, Hq, Nq, Nk)`. Causality is bottom-right aligned: the last query sees the last key, so that one query against a
cache of N keys sees them all.
"""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEG_INF = float("-inf")


def causal(
    n_queries: int, n_keys: int, *, rows: slice | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "q k"]:
    """Return the `(Nq, Nk)` lower-triangular mask, aligned at the last query and the last key, or some `rows` of it."""
    start, stop, _ = (rows or slice(None)).indices(n_queries)
    query = torch.arange(start, stop, device=device) + (n_keys - n_queries)
    return query[:, None] >= torch.arange(n_keys, device=device)


def window(
    n_queries: int, n_keys: int, size: int, *, sinks: int = 0, device: torch.device | str | None = None
) -> Bool[Tensor, "q k"]:
    """Return the causal mask of the last `size` keys (the query's own included) and the first `sinks` keys."""
    query = torch.arange(n_queries, device=device)[:, None] + (n_keys - n_queries)
    key = torch.arange(n_keys, device=device)
    return (key <= query) & ((query - key < size) | (key < sinks))


def padding(lengths: Tensor, n_keys: int, *, left: bool = False) -> Bool[Tensor, "b 1 1 k"]:
    """Return the mask `(B, 1, 1, Nk)` of the real keys, from the number of real tokens in each sequence `(B,)`."""
    key = torch.arange(n_keys, device=lengths.device)
    real = key >= (n_keys - lengths)[:, None] if left else key < lengths[:, None]
    return real[:, None, None, :]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Turn a mask into a float bias: 0 where a key may be seen and -inf elsewhere; a float mask is only cast."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, NEG_INF)


def allowed(mask: Tensor) -> Bool[Tensor, "..."]:
    """Return the bool part of a mask: a float bias forbids a key where it is -inf."""
    return mask if mask.dtype == torch.bool else mask > NEG_INF


def hide_lowest(mask: Tensor | None) -> Tensor | None:
    """Replace the lowest value of a mask's dtype by `-inf`, since both forbid a key.

    Models often write `torch.finfo(dtype).min`. Engines would treat it as a large bias, and the output of a row of such
    values would depend on their rounding.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, NEG_INF)


def combine(*masks: Tensor | None) -> Tensor | None:
    """Combine masks: each must allow a key, and float biases add up. None if nothing is masked."""
    present = [mask for mask in masks if mask is not None]
    bools = [mask for mask in present if mask.dtype == torch.bool]
    biases = [mask for mask in present if mask.dtype != torch.bool]
    total = reduce(torch.logical_and, bools) if bools else None
    if not biases:
        return total
    bias = reduce(torch.add, biases)
    return bias if total is None else bias.masked_fill(~total, NEG_INF)


def rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """Return the part of a broadcastable mask that belongs to some queries."""
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., rows, :]


def columns_of(mask: Tensor | None, columns: slice) -> Tensor | None:
    """Return the part of a broadcastable mask that belongs to some keys."""
    if mask is None or mask.dim() < 1 or mask.shape[-1] == 1:
        return mask
    return mask[..., columns]


def keys_of(mask: Tensor, batch: int, n_keys: int) -> Bool[Tensor, "b k"]:
    """Return the keys `(B, Nk)` that a mask of kind "keys" allows; it broadcasts to `(B, 1, 1, Nk)`."""
    return torch.broadcast_to(mask, (batch, 1, 1, n_keys))[:, 0, 0]


def visible(mask: Tensor) -> Bool[Tensor, "b k"]:
    """Return the keys that some query of some head may see, `(B or 1, Nk or 1)`."""
    return allowed(mask).reshape((1,) * (4 - mask.dim()) + mask.shape).flatten(1, 2).any(1)


def without_hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero keys or values `(B, Hkv, Nk, ·)` that no query may see, so that padding has no influence."""
    return x if mask is None else x.masked_fill(~visible(mask)[:, None, :, None], 0.0)


def full(
    mask: Tensor | None, is_causal: bool, n_queries: int, n_keys: int, device: torch.device | str
) -> Tensor | None:
    """Combine the user's mask and causality in one broadcastable tensor (None if every key may be seen)."""
    return combine(mask, causal(n_queries, n_keys, device=device) if is_causal else None)
