"""Parts of policies that evict nothing and read few keys: visible keys, their logits, and the largest of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.errors import UnsupportedModel
from foveate.core.scoring import dot_product
from foveate.host.attention import soft_capped
from foveate.host.padding import last_query, tokens
from foveate.host.site import Site

#: Added for each token to break ties: as a share of the score, and to a score of zero. Both are below float32 rounding.
_TIE, _TINY = 1e-14, 1e-300


def has_everything(site: Site) -> bool:
    """Return whether a causal call holds all tokens of its sequence; a window or an evicting policy leaves fewer.

    Raises:
        UnsupportedModel: the layer holds tokens encoded, and its slots are not in the order of the sequence.
    """
    if site.slots is not None and site.slots.store is not None and site.slots.store.codes is not None:
        raise UnsupportedModel(
            f"layer {site.layer} holds tokens encoded, and a policy that reads chosen keys needs them in full "
            f"precision; apply one of the two"
        )
    return site.is_causal and site.is_whole and site.k.shape[2] == site.seen


def visible(site: Site, rows: slice = slice(None)) -> Bool[Tensor, "b s"] | None:
    """Return a mask of the keys that any of these queries may see in any head, the future included; None for all."""
    if site.is_plain_causal:
        return None if site.key_mask is None else site.key_mask[:, 0, 0]
    if site.mask is None:
        return None
    return masks.allowed(site.mask)[:, :, rows].any(2).any(1).expand(site.q.shape[0], -1)


def last_logits(site: Site) -> Float[Tensor, "b hq s"]:
    """Return the logits of each sequence's last query that is a token, -inf for keys that it may not see."""
    query, has, last = last_query(site)
    groups = query.unflatten(1, (site.k.shape[1], -1))
    logits = soft_capped(dot_product(groups, site.k, site.scale), site.softcap).flatten(1, 2).float()
    mask = site.key_mask if site.is_plain_causal else site.mask
    if mask is None:
        return logits
    if last is not None and mask.shape[2] > 1:
        index = last[:, None, None, None].expand(-1, mask.shape[1], 1, mask.shape[3])
        mask = mask.expand(index.shape[0], -1, -1, -1).gather(2, index)[:, :, 0]
    else:
        mask = mask[:, :, -1]
    logits = logits if mask.dtype == torch.bool else logits + mask
    return logits.masked_fill(~masks.allowed(mask), masks.NEG_INF)


def max_pooled(scores: Float[Tensor, "*b n"], width: int) -> Float[Tensor, "*b n"]:
    """Max-pool scores over `width` places, which is odd; 0 and 1 change nothing."""
    if width <= 1:
        return scores
    return F.max_pool1d(scores.reshape(-1, 1, scores.shape[-1]), width, 1, width // 2).reshape(scores.shape)


def top_keys(
    scores: Float[Tensor, "b *h n"], k: int, site: Site, pool: int = 0, allowed: Bool[Tensor, "b *h n"] | None = None,
    ranked: bool = True,
) -> Int[Tensor, "b *h k"]:  # fmt: skip
    """Return the `k` keys with the largest scores after a max-pool along each sequence, sorted if `ranked`.

    Padding is left out of the pool and is chosen last, after the keys that are not `allowed`. Among equal scores, which
    a pool produces, the later token is chosen, so that the choice is the same with and without a batch.
    """
    found = tokens(site) if pool > 1 else None
    n, between = scores.shape[-1], (1,) * (scores.dim() - 2)
    if found is None:
        scores = max_pooled(scores, pool)
    else:
        index = _first_places(found.order, n).view(-1, *between, n).expand_as(scores)
        scores = torch.empty_like(scores).scatter_(-1, index, max_pooled(scores.gather(-1, index), pool))
        scores = scores.masked_fill(~found.real[:, :n].view(-1, *between, n), -2.0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed & (scores > -2.0), -1.0)
    if pool > 1:
        rank = torch.arange(n, device=scores.device, dtype=torch.float64)
        scores = scores.double() * (1 + _TIE * rank) + _TINY * rank
    return scores.topk(min(k, n), sorted=ranked).indices


def _first_places(order: Int[Tensor, "b n"], n: int) -> Int[Tensor, "b k"]:
    """Return each row of an order without the places from `n` on. A mask as index would make the host wait."""
    if n == order.shape[1]:
        return order
    return order.gather(1, (order >= n).to(torch.uint8).argsort(dim=-1, stable=True)[:, :n])


def cosine(a: Float[Tensor, "b hq d"], b: Float[Tensor, "b hq d"]) -> Float[Tensor, " b"]:
    """Return the cosine between two steps' queries, over all heads of a layer at once."""
    return F.cosine_similarity(a.flatten(1).float(), b.flatten(1).float(), -1)
