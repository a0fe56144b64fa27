"""Attention to a layer whose older tokens are held encoded.

Chunks of tokens are decoded one at a time into a small buffer, and merged by online softmax with each other and with
the tokens in full precision. So no copy of the whole cache is made, and no matrix of all queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core.masks import NEG_INF
from foveate.host.hf.mask import MaskPlan, at_positions
from foveate.host.slots.codes import CHUNK, Chunk
from foveate.host.slots.group import Group
from foveate.host.slots.slots import EMPTY, narrow
from foveate.host.slots.store import Store

#: Queries that are computed at once.
ROWS = 512


@dataclass(frozen=True, eq=False)
class Place:
    """Some slots of some heads of a layer.

    Args:
        heads: the key/value heads.
        positions: their positions, `(B, h, s)`.
        first: their place in the layer's list of slots.
        is_full: whether every one is known to hold a token.
        bias: the term added to their logits, `(B, h, s)`; None for none.
    """

    heads: slice | Tensor
    positions: Tensor
    first: int
    is_full: bool
    bias: Tensor | None = None


#: Returns what some queries see of some slots, as a bias of the logits or a bool mask that broadcasts to
#: `(B, h, G, n, s)`; None if they see all.
Visible = Callable[[slice, Place], Tensor | None]


def by_position(plan: MaskPlan) -> Visible:
    """Return what queries see by a description of a mask."""
    sees_all = plan.sees_all()
    known = lru_cache(1)(lambda start, stop: plan.whole.rows(slice(start, stop)))

    def visible(rows: slice, place: Place) -> Tensor | None:
        seen = None
        if not sees_all:
            seen = at_positions(known(rows.start, rows.stop), place.positions, plan.first_key)[:, :, None]
        elif not place.is_full:
            seen = (place.positions != EMPTY)[:, :, None, None]
        if place.bias is None:
            return seen
        bias = place.bias[:, :, None, None]
        return bias if seen is None else torch.where(seen, bias, NEG_INF)

    return visible


def by_mask(mask: Tensor | None, n_heads: int) -> Visible:
    """Return what queries see by the whole mask of a site, in which the biases of slots are included."""

    def visible(rows: slice, place: Place) -> Tensor | None:
        if mask is None:
            return None
        part = mask[..., place.first : place.first + place.positions.shape[2]]
        part = part[:, :, rows] if part.shape[2] > 1 else part
        return part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, (n_heads, -1))[:, place.heads]

    return visible


def attend(
    q: Float[Tensor, "b hq nq d"], store: Store, visible: Visible, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None, dropout: float = 0.0,
) -> Float[Tensor, "b hq nq dv"]:  # fmt: skip
    """Compute attention to all that a layer stores.

    Args:
        q: the queries.
        store: the layer's slots, some of them encoded.
        visible: see `Visible`.
        scale: factor of the logits.
        softcap: cap of the logits; None for none.
        sinks: learnt logits without a key, as in `Site`.
        dropout: share of the weights that become zero.
    """
    outs = []
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[2]))
        some = _Softmax(q[:, :, rows], store, partial(visible, rows), scale, softcap, dropout)
        for chunk, first in () if store.codes is None else store.codes.placed():
            some.add_chunk(chunk, first)
        for group in store.groups:
            some.add_group(group)
        if sinks is not None:
            some.add_sinks(sinks if sinks.shape[2] == 1 else sinks[:, :, rows])
        outs.append(some.result())
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


class _Softmax:
    """The softmax of some queries over the slots that were added so far: largest logit, sum of weights, and output."""

    def __init__(
        self, q: Float[Tensor, "b hq n d"], store: Store, visible: Callable[[Place], Tensor | None], scale: float,
        softcap: float | None, dropout: float,
    ) -> None:  # fmt: skip
        self.visible, self.scale, self.softcap, self.dropout = visible, scale, softcap, dropout
        self.given, self.dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
        self.q = q.to(self.dtype).unflatten(1, (store.n_heads, -1))  # (B, Hkv, G, n, D)
        self.coded = store.coded_length
        self.top = self.q.new_full((*self.q.shape[:4], 1), NEG_INF)
        self.mass = torch.zeros_like(self.top)
        self.out = self.q.new_zeros(*self.q.shape[:4], store.groups[0].slots.v.shape[3])

    def add_chunk(self, chunk: Chunk, first: int) -> None:
        heads = chunk.index
        logits = chunk.into(self.q[:, heads].flatten(2, 3)) @ chunk.decode("k", self.dtype).transpose(2, 3)
        place = Place(heads, chunk.positions, first, chunk.is_full)
        self._add(place, logits, lambda weights: chunk.restore("v", weights @ chunk.decode("v", self.dtype)))

    def add_group(self, group: Group) -> None:
        slots, queries = group.all(), self.q[:, group.index].flatten(2, 3)
        for start in range(0, slots.positions.shape[2], CHUNK):
            part = narrow(slots, start, start + CHUNK)
            bias = None if group.bias is None else group.bias[:, :, start : start + CHUNK].to(self.dtype)
            place = Place(group.index, part.positions, self.coded + start, not group.has_empty, bias)
            values = part.v.to(self.dtype)
            self._add(place, queries @ part.k.to(self.dtype).transpose(2, 3), values.__rmatmul__)

    def _add(self, place: Place, logits: Tensor, weighted: Callable[[Tensor], Tensor]) -> None:
        """Add some slots.

        Args:
            place: the slots.
            logits: dot products `(B, h, G n, s)`.
            weighted: returns the sum of their values under some weights.
        """
        shape = self.q[:, place.heads].shape[:4]
        logits = (logits * self.scale).view(*shape, -1)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        seen = self.visible(place)
        if seen is not None:
            logits = logits.masked_fill(~seen, NEG_INF) if seen.dtype == torch.bool else logits + seen
        top = torch.maximum(self.top[:, place.heads], logits.amax(-1, keepdim=True))
        base = top.masked_fill(top == NEG_INF, 0.0)  # of a query that has seen no slot yet
        weights, fade = (logits - base).exp(), (self.top[:, place.heads] - base).exp()
        self.mass[:, place.heads] = self.mass[:, place.heads] * fade + weights.sum(-1, keepdim=True)
        more = weighted(F.dropout(weights, self.dropout).flatten(2, 3)).view(*shape, -1)
        self.out[:, place.heads] = self.out[:, place.heads] * fade + more
        self.top[:, place.heads] = top

    def add_sinks(self, sinks: Float[Tensor, "#b hq #n 1"]) -> None:
        """Add learnt logits without a value."""
        logits = sinks.to(self.dtype).unflatten(1, (self.q.shape[1], -1)).expand_as(self.top)
        top = torch.maximum(self.top, logits)
        fade = (self.top - top).exp()
        self.mass, self.out = self.mass * fade + (logits - top).exp(), self.out * fade
        self.top = top

    def result(self) -> Float[Tensor, "b hq n dv"]:
        """Return the output; zero for a query that saw no slot."""
        return (self.out / self.mass.masked_fill(self.mass == 0, 1.0)).flatten(1, 2).to(self.given)
