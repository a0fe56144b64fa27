"""What policies share that evict nothing and read few keys: what may be read, and how much it matters."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.scoring import dot_product
from foveate.host.attention import soft_capped
from foveate.host.site import Site


def has_everything(site: Site) -> bool:
    """Whether a causal call has all tokens of its sequence at hand; a window, or a policy that evicts, leaves fewer."""
    return site.is_causal and site.is_whole and site.k.shape[2] == site.seen


def visible(site: Site, rows: slice = slice(None)) -> Bool[Tensor, "b s"] | None:
    """The keys that some head of some of these queries may see, the future included; None for all."""
    if site.is_plain_causal:
        return None if site.key_mask is None else site.key_mask[:, 0, 0]
    if site.mask is None:
        return None
    return masks.allowed(site.mask)[:, :, rows].any(2).any(1).expand(site.q.shape[0], -1)


def last_logits(site: Site) -> Float[Tensor, "b hq s"]:
    """The last query's logits, -inf where it may not look."""
    groups = site.q[:, :, -1].unflatten(1, (site.k.shape[1], -1))
    logits = soft_capped(dot_product(groups, site.k, site.scale), site.softcap).flatten(1, 2).float()
    mask = site.key_mask if site.is_plain_causal else site.mask
    if mask is None:
        return logits
    mask = mask[:, :, -1]
    logits = logits if mask.dtype == torch.bool else logits + mask
    return logits.masked_fill(~masks.allowed(mask), masks.NEVER)


def max_pooled(scores: Float[Tensor, "*b n"], width: int) -> Float[Tensor, "*b n"]:
    """Each score raised to the largest within `width` places (odd; 0 and 1 change nothing): neighbours come along."""
    if width <= 1:
        return scores
    return F.max_pool1d(scores.reshape(-1, 1, scores.shape[-1]), width, 1, width // 2).reshape(scores.shape)


def cosine(a: Float[Tensor, "b hq d"], b: Float[Tensor, "b hq d"]) -> Float[Tensor, " b"]:
    """How alike two steps' queries are, over all heads of a layer at once."""
    return F.cosine_similarity(a.flatten(1).float(), b.flatten(1).float(), -1)
