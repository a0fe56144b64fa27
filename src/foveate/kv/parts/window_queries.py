"""The last queries of a prompt: their attention to all slots, which many scores are made of."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.masks import NEG_INF
from foveate.core.scoring import dot_product, safe_softmax
from foveate.host.attention import soft_capped
from foveate.host.padding import tokens
from foveate.host.site import Site


def last_rows(site: Site, width: int) -> tuple[Int[Tensor, "b w"], Bool[Tensor, "b w"]]:
    """Return the numbers of each sequence's last `width` queries that are tokens, and which of them there are.

    A call of fewer queries gives what it has. A question that will be removed again counts; drafts, which may be
    refused, do not.
    """
    batch, device = site.q.shape[0], site.q.device
    drafts = site.tentative if site.drafts and site.q.shape[2] > site.tentative else 0
    n = site.q.shape[2] - drafts
    width = min(width, n)
    real = site.real_queries if tokens(site) is not None else None
    real = None if real is None else real[:, :n]
    if real is None:
        rows = torch.arange(n - width, n, device=device).expand(batch, width)
        return rows, torch.ones(batch, width, dtype=torch.bool, device=device)
    order = real.to(device).to(torch.uint8).argsort(dim=-1, stable=True)[:, -width:]  # padding first, then tokens
    return order, real.to(device).gather(1, order)


def window_weights(site: Site, width: int) -> tuple[Float[Tensor, "b hq w s"], Bool[Tensor, "b w"], Int[Tensor, "b w"]]:
    """Return the attention weights of each sequence's last `width` queries, over the slots that they see.

    Returns:
        The weights, which queries there are, and the queries' positions in the batch.
    """
    rows, real = last_rows(site, width)
    index = rows[:, None, :, None].expand(-1, site.q.shape[1], -1, site.q.shape[3])
    queries = site.q.gather(2, index).unflatten(1, (site.k.shape[1], -1)).flatten(2, 3)
    logits = dot_product(queries, site.k, site.scale).float()
    logits = soft_capped(logits, site.softcap).unflatten(2, (-1, rows.shape[1])).flatten(1, 2)
    at = site.query_positions[rows]
    seen = visible_slots(site, at).repeat_interleave(logits.shape[1] // site.positions.shape[1], 1)
    return safe_softmax(logits.masked_fill(~(seen & real[:, None, :, None]), NEG_INF)), real, at


def visible_slots(site: Site, at: Int[Tensor, "b w"]) -> Bool[Tensor, "b hkv w s"]:
    """Return which slots queries at these positions see: tokens up to their own, within the layer's window."""
    positions, found = site.positions, tokens(site)
    own = positions if found is None else found.own(positions)
    distance = at[:, None, :, None] - positions[:, :, None]
    seen = (distance >= 0) & (own >= 0)[:, :, None]
    window = None if site.slots is None else site.slots.window
    return seen if window is None else seen & (distance < window)


def per_kv_head(x: Float[Tensor, "b hq *n"], site: Site, how: str = "mean") -> Float[Tensor, "b hkv *n"]:
    """Combine the query heads of each key/value head: "mean", "max" or "sum"."""
    grouped = x.unflatten(1, (site.positions.shape[1], -1))
    if how == "mean":
        return grouped.mean(2)
    return grouped.amax(2) if how == "max" else grouped.sum(2)


def pooled(scores: Float[Tensor, "b h s"], site: Site, width: int, how: str = "mean") -> Float[Tensor, "b h s"]:
    """Pool scores of query heads or of key/value heads over neighbouring tokens that are stored.

    `how` is "mean", with zeros beyond the ends, or "max". Slots stand in no particular order, so that they are sorted
    by their positions first. Padding counts as a zero.
    """
    if width <= 1:
        return scores
    found, positions = tokens(site), site.positions
    own = positions if found is None else found.own(positions)
    own = own.repeat_interleave(scores.shape[1] // own.shape[1], 1)
    order = own.masked_fill(own < 0, torch.iinfo(own.dtype).max).argsort(dim=-1, stable=True)
    rows = scores.masked_fill(own < 0, 0.0).gather(-1, order).flatten(0, 1)[:, None]
    rows = F.avg_pool1d(rows, width, 1, width // 2) if how == "mean" else F.max_pool1d(rows, width, 1, width // 2)
    return torch.empty_like(scores).scatter_(-1, order, rows[:, 0].view_as(scores))
