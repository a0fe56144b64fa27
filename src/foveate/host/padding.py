"""Padding: where each token of a batch stands in its own sequence, and each sequence by itself.

Policies count tokens from where a sequence begins to where it ends, so that a sequence gets the same whether it stands
alone or in a batch, padded on the left, on the right, or in between as right-padded prompts are that were decoded from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.host.site import Site
from foveate.host.slots.slots import EMPTY


class Tokens:
    """The tokens of a padded batch so far, without their padding.

    Attributes:
        real: which positions are tokens, `(B, N)`.
        rank: how many tokens of its sequence stand before each, `(B, N)`; `EMPTY` for padding.
        count: tokens of each sequence, `(B,)`.
    """

    def __init__(self, real: Bool[Tensor, "b n"]) -> None:
        self.real = real
        counted = real.cumsum(-1, dtype=torch.int32)
        self.rank: Int[Tensor, "b n"] = (counted - 1).masked_fill(~real, EMPTY)
        self.count: Int[Tensor, " b"] = counted[:, -1]

    def own(self, positions: Int[Tensor, "b h s"]) -> Int[Tensor, "b h s"]:
        """Positions in the batch as positions in their own sequence; `EMPTY` where no token of it stands."""
        index = positions.clamp(0, self.rank.shape[1] - 1).long()
        rank = self.rank[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        return rank.masked_fill(positions < 0, EMPTY)

    def before(self, end: int) -> Int[Tensor, " b"]:
        """Tokens of each sequence before a position in the batch."""
        return self.real[:, :end].sum(-1, dtype=torch.int32)

    @cached_property
    def order(self) -> Int[Tensor, "b n"]:
        """Where each sequence's tokens stand, one after another, and then its padding."""
        return (~self.real).to(torch.uint8).argsort(dim=-1, stable=True)

    def at(self, own: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """The positions in the batch of some tokens, given by their place in their own sequence."""
        return self.order.gather(1, own.clamp(0, self.order.shape[1] - 1).long())


def tokens(site: Site) -> Tokens | None:
    """The tokens of the sequences so far; None where none is padded. Counted once for each forward pass."""
    key = (tokens, site.seen, site.q.device)
    if key not in site.step:
        real = site.real
        real = None if real is None else real[:, : site.seen].to(site.q.device)
        site.step[key] = None if real is None else Tokens(real)
    return site.step[key]


def last_query(site: Site) -> tuple[Float[Tensor, "b hq d"], Bool[Tensor, " b"] | None, Int[Tensor, " b"] | None]:
    """Each sequence's last query that is a token, which sequences have one, and its number; None, None: the last."""
    real = site.real_queries if tokens(site) is not None else None
    if real is None or site.q.shape[2] == 1:
        return site.q[:, :, -1], None, None
    real = real.to(site.q.device)
    last = real.shape[1] - 1 - real.flip(-1).to(torch.uint8).argmax(-1)
    index = last[:, None, None, None].expand(-1, site.q.shape[1], 1, site.q.shape[3])
    return site.q.gather(2, index)[:, :, 0], real.any(-1), last


def alone(site: Site) -> Iterator[tuple[Tensor, Tensor, Site]]:
    """The sequences of a padded batch by themselves: `(which rows, which queries, the call without their padding)`.

    Sequences with the same padding come together. The call has to have all its keys at hand. What methods remember is
    not carried over.
    """
    found = tokens(site)
    assert found is not None
    kinds, kind = found.real.unique(dim=0, return_inverse=True)
    n = site.q.shape[2]
    for number, real in enumerate(kinds):
        queries = real[-n:].nonzero()[:, 0]
        if queries.numel():
            rows = (kind == number).nonzero()[:, 0]
            yield rows, queries, _part(site, rows, queries, real.nonzero()[:, 0])


def _part(site: Site, rows: Tensor, queries: Tensor, keys: Tensor) -> Site:
    mask = None
    if not site.is_plain_causal and site.mask is not None:
        whole = site.mask.expand(site.q.shape[0], -1, site.q.shape[2], site.k.shape[2])
        mask = whole[rows][:, :, queries][..., keys]
    return Site(
        module=site.module, layer=site.layer, order=site.order, q=site.q[rows][:, :, queries],
        new_k=site.k[rows][:, :, keys], new_v=site.v[rows][:, :, keys], scale=site.scale, attention_mask=mask,
        is_causal=True, dropout=site.dropout, softcap=site.softcap,
    )  # fmt: skip


def each_alone(site: Site, attend: Callable[[Site, Tensor], Tensor]) -> Float[Tensor, "b hq nq dv"]:
    """What `attend(call, rows)` gives for each sequence without its padding; zeros for the padding."""
    out = site.q.new_zeros(*site.q.shape[:3], site.v.shape[-1])
    for rows, queries, part in alone(site):
        out[rows[:, None], :, queries] = attend(part, rows).transpose(1, 2).to(out.dtype)
    return out
