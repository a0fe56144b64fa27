"""The last queries of a prompt: their attention to all slots, which many scores are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, eq=False)
class LastQueries:
    """The last queries of each sequence, which may be of several calls.

    Args:
        q: the queries `(B, Hq, w, D)`.
        real: which of them there are, `(B, w)`.
        at: their positions in the batch, `(B, w)`.
    """

    q: Float[Tensor, "b hq w d"]
    real: Bool[Tensor, "b w"]
    at: Int[Tensor, "b w"]

    @classmethod
    def of(cls, site: Site, width: int) -> LastQueries:
        """Return those of a call."""
        rows, real = last_rows(site, width)
        index = rows[:, None, :, None].expand(-1, site.q.shape[1], -1, site.q.shape[3])
        return cls(site.q.gather(2, index), real, site.query_positions[rows])

    @classmethod
    def noted(cls, notes: dict[str, Any], site: Site, width: int) -> LastQueries:
        """Return those of a call and of the calls before it, and keep them in `notes` for the next call."""
        new = cls.of(site, width)
        if "queries" in notes:
            q, real, at = (
                torch.cat([notes["queries"], new.q], 2), torch.cat([notes["are"], new.real], 1),
                torch.cat([notes["places"], new.at], 1),
            )  # fmt: skip
            order = real.to(torch.uint8).argsort(dim=-1, stable=True)[:, -width:]
            index = order[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
            new = cls(q.gather(2, index), real.gather(1, order), at.gather(1, order))
        notes.update(queries=new.q, are=new.real, places=new.at)
        return new

    @classmethod
    def in_notes(cls, notes: dict[str, Any]) -> LastQueries:
        """Return those that `noted` kept."""
        return cls(notes["queries"], notes["are"], notes["places"])


def window_weights(site: Site, queries: LastQueries) -> Float[Tensor, "b hq w s"]:
    """Return the attention weights of the last queries, over the slots that they see."""
    logits = window_logits(site, queries)
    seen = visible_slots(site, queries.at).repeat_interleave(logits.shape[1] // site.positions.shape[1], 1)
    return safe_softmax(logits.masked_fill(~(seen & queries.real[:, None, :, None]), NEG_INF))


def window_votes(site: Site, queries: LastQueries) -> Float[Tensor, "b hq s"]:
    """Return the sum of the weights that the last queries pay to each token before them; zero for their own tokens.

    These stay in any case, and must not enter the pool of the tokens before them.
    """
    weights = window_weights(site, queries).sum(2)
    first = queries.at.masked_fill(~queries.real, site.seen).amin(-1)[:, None, None]
    inside = (site.positions >= first).repeat_interleave(weights.shape[1] // site.positions.shape[1], 1)
    return weights.masked_fill(inside, 0.0)


def window_logits(site: Site, queries: LastQueries) -> Float[Tensor, "b hq w s"]:
    """Return the logits of the last queries and all slots, soft cap included and mask not."""
    q = queries.q.unflatten(1, (site.k.shape[1], -1)).flatten(2, 3)
    logits = soft_capped(dot_product(q, site.k, site.scale).float(), site.softcap)
    return logits.unflatten(2, (-1, queries.q.shape[2])).flatten(1, 2)


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
