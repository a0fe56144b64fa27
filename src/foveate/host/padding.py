"""Padding: the place of each token of a batch in its own sequence, and sequences without their padding.

Policies count tokens from the first to the last of a sequence. So a sequence gets the same result by itself and in a
batch, padded on the left, on the right, or in the middle (right-padded prompts after decoding).
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
        real: True for the positions that are tokens, `(B, N)`.
        rank: number of tokens of the same sequence before each token, `(B, N)`; `EMPTY` for padding.
        count: tokens of each sequence, `(B,)`.
    """

    def __init__(self, real: Bool[Tensor, "b n"]) -> None:
        self.real = real
        counted = real.cumsum(-1, dtype=torch.int32)
        self.rank: Int[Tensor, "b n"] = (counted - 1).masked_fill(~real, EMPTY)
        self.count: Int[Tensor, " b"] = counted[:, -1]

    def own(self, positions: Int[Tensor, "b h s"]) -> Int[Tensor, "b h s"]:
        """Convert positions in the batch to positions in their own sequence; `EMPTY` for padding."""
        index = positions.clamp(0, self.rank.shape[1] - 1).long()
        rank = self.rank[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        return rank.masked_fill(positions < 0, EMPTY)

    def before(self, end: int) -> Int[Tensor, " b"]:
        """Count the tokens of each sequence before a position in the batch."""
        return self.real[:, :end].sum(-1, dtype=torch.int32)

    @cached_property
    def order(self) -> Int[Tensor, "b n"]:
        """The positions of each sequence's tokens in order, then those of its padding."""
        return (~self.real).to(torch.uint8).argsort(dim=-1, stable=True)

    def at(self, own: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """Convert positions in their own sequence to positions in the batch."""
        return self.order.gather(1, own.clamp(0, self.order.shape[1] - 1).long())


def tokens(site: Site) -> Tokens | None:
    """Return the tokens of the sequences so far; None if none is padded. They are counted once per forward pass."""
    key = (tokens, site.seen, site.q.device)
    if key not in site.step:
        real = site.real
        real = None if real is None else real[:, : site.seen].to(site.q.device)
        site.step[key] = None if real is None else Tokens(real)
    return site.step[key]


def last_query(site: Site) -> tuple[Float[Tensor, "b hq d"], Bool[Tensor, " b"] | None, Int[Tensor, " b"] | None]:
    """Return each sequence's last query that is a token, the sequences that have one, and its number.

    The second and third are None if the last query of every sequence is a token.
    """
    real = site.real_queries if tokens(site) is not None else None
    if real is None or site.q.shape[2] == 1:
        return site.q[:, :, -1], None, None
    real = real.to(site.q.device)
    last = real.shape[1] - 1 - real.flip(-1).to(torch.uint8).argmax(-1)
    index = last[:, None, None, None].expand(-1, site.q.shape[1], 1, site.q.shape[3])
    return site.q.gather(2, index)[:, :, 0], real.any(-1), last


def unpadded(site: Site) -> Iterator[tuple[Tensor, Tensor, Site]]:
    """Yield the sequences of a padded batch without their padding, as `(rows, queries, call)`.

    Sequences with the same padding come together. The call must hold all its keys. Notes of methods are not copied.
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


def attend_unpadded(site: Site, attend: Callable[[Site, Tensor], Tensor]) -> Float[Tensor, "b hq nq dv"]:
    """Call `attend(call, rows)` on each sequence without its padding; the output is zero for the padding."""
    out = site.q.new_zeros(*site.q.shape[:3], site.v.shape[-1])
    for rows, queries, part in unpadded(site):
        out[rows[:, None], :, queries] = attend(part, rows).transpose(1, 2).to(out.dtype)
    return out
