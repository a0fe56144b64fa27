"""The attention weights of a call, a few rows at a time, also where no fused kernel computes them.

This covers windows, soft caps, the caller's masks, evicted layers, selected keys and edited weights. It is exact and
several times slower than the kernel. Memory stays linear, and rows are cut to the columns that a query sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import masks
from foveate.core.engines.fused import FEW
from foveate.core.scoring import dot_product
from foveate.host.attention import soft_capped, softmax
from foveate.host.fused_statistics import grouped
from foveate.host.hf.mask import MaskPlan
from foveate.host.site import Site

#: The largest number of weights in a tile.
TILE = 1 << 20


@dataclass(frozen=True, eq=False)
class WeightTile:
    """Weights of some rows and columns; their other columns are zero. `seen` is None if every pair is visible."""

    weights: Float[Tensor, "b h r k"]
    seen: Bool[Tensor, "#b #h #r k"] | None
    keys: slice
    rows: slice

    def visible(self) -> Float[Tensor, "b h k"]:
        """Return the number of nonzero rows that see each key."""
        counted = (self.weights.sum(-1, keepdim=True) > 0).to(self.weights.dtype)
        return (counted.expand(self.weights.shape) if self.seen is None else counted * self.seen).sum(-2)


def tiles(site: Site) -> Iterator[WeightTile]:
    """Yield the weights of a call, all heads and some rows at a time."""
    batch, heads, n = site.q.shape[:3]
    step = max(1, TILE // max(1, batch * heads * site.k.shape[2]))
    return (weight_tile(site, slice(start, min(start + step, n))) for start in range(0, n, step))


def weights_of(site: Site, rows: slice, head: int) -> Float[Tensor, "b r s"]:
    """Return one head's weights of some rows, over all keys."""
    tile = weight_tile(site, rows, slice(head, head + 1))
    whole = tile.weights.new_zeros(*tile.weights.shape[:3], site.k.shape[2])
    whole[..., tile.keys] = tile.weights
    return whole[:, 0]


def weight_tile(site: Site, rows: slice, heads: slice = slice(None)) -> WeightTile:
    """Return the weights of some rows as they were used, in float32 or better; rows of padding are zero."""
    mask = _mask(site, rows, heads)
    seen = None if mask is None else _allowed(mask)
    n_keys, few = site.k.shape[2], site.q.shape[2] <= FEW
    keys = slice(0, n_keys) if few else _span(seen, n_keys)  # the host waits for the device to learn the span
    if seen is not None and mask is not None:
        mask, seen = masks.columns_of(mask, keys), masks.columns_of(seen, keys)
    if site.weights is not None:
        weights = site.weights.detach()[:, heads, rows, keys]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    else:
        weights = _softmax(site, rows, heads, keys, mask, seen)
    if site.real_queries is not None:
        weights = weights.masked_fill(~site.real_queries[:, None, rows, None], 0.0)
    return WeightTile(weights, seen, keys, rows)


def _softmax(
    site: Site, rows: slice, heads: slice, keys: slice, mask: Tensor | None, seen: Tensor | None
) -> Float[Tensor, "b h r k"]:
    some = site.q[:, heads, rows], grouped(site.k[:, :, keys], site.q.shape[1])[:, heads]
    q, k = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in some)
    logits = soft_capped(dot_product(q, k, site.scale), site.softcap)
    if mask is not None and seen is not None:
        logits = logits if mask.dtype == torch.bool else logits + mask
        logits = logits.masked_fill(~seen, masks.NEG_INF)
    return softmax(site, logits, rows, heads)


def _mask(site: Site, rows: slice, heads: slice) -> Tensor | None:
    """Combine the model's mask and the methods' selections for some rows, without building the whole mask."""
    plan, n = site.attention_mask, site.q.shape[2]
    is_whole = site.is_whole and site.hidden_keys is None
    if is_whole and isinstance(plan, MaskPlan):
        mask: Tensor | None = plan.rows(rows)
    elif is_whole and plan is None:
        causal = site.is_causal and n > 1
        mask = masks.causal(n, site.k.shape[2], rows=rows, device=site.q.device)[None, None] if causal else None
    else:
        mask = masks.rows_of(site.mask, rows)
    if site.position_bias is not None and is_whole:
        mask = masks.combine(mask, masks.rows_of(site.position_bias[..., -site.k.shape[2] :], rows))
    mask = masks.combine(mask, *(selection.dense(rows) for selection in site.selections))
    return mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask


def _allowed(mask: Tensor) -> Bool[Tensor, "b h r k"]:
    """Return the visible pairs; a float bias may also hide with the least finite number, as transformers does."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _span(seen: Tensor | None, n: int) -> slice:
    """Return the range from the first to the last key that any row sees."""
    if seen is None or seen.shape[-1] == 1:
        return slice(0, n)
    some = seen.flatten(0, -2).any(0).nonzero()
    return slice(int(some[0]), int(some[-1]) + 1) if some.numel() else slice(0, 1)
