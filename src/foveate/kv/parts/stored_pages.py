"""Pages of the tokens that a layer stores, in the order of each head's own tokens, also after an eviction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import UnsupportedModel
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base.scored import own_positions
from foveate.kv.parts.page_bounds import add_own_pages, add_pages, extremes


@dataclass(frozen=True, eq=False)
class StoredPages:
    """The full pages of a layer and, as the last column, the page that is being filled.

    Args:
        table: each page's extremes, or its key if a page is one token.
        sizes: tokens of each page, `(B or 1, 1, P)`.
        page: tokens in a full page.
        last: the number of the page in the last column, `(B or 1, 1, 1)`; the others are numbered by their columns.
        at: converts numbers of stored tokens, `(B, 1 or H, n)`, to numbers of slots, `(B, H, n)`.
    """

    table: Float[Tensor, "b h p e"]
    sizes: Int[Tensor, "#b 1 p"]
    page: int
    last: Int[Tensor, "#b 1 1"]
    at: Callable[[Tensor], Tensor]

    def best(self, weights: Float[Tensor, "b h p"], count: int) -> tuple[Int[Tensor, "b h n"], Bool[Tensor, "b h n"]]:
        """Return the `count` tokens of the pages with the largest weights, and a mask of those that are tokens.

        If a page does not fit, its first tokens are taken.
        """
        chosen = weights.topk(min(weights.shape[2], -(-count // self.page) + 1)).indices
        inside = torch.arange(self.page, device=weights.device)
        size = self.sizes.expand(weights.shape[0], weights.shape[1], -1).gather(2, chosen)
        number = torch.where(chosen == weights.shape[2] - 1, self.last, chosen)
        own = (number[..., None] * self.page + inside).flatten(2)
        real = (inside < size[..., None]).flatten(2)
        return own, real & (real.cumsum(-1) <= count)


def stored_pages(site: Site, notes: dict[str, Any], page: int) -> StoredPages:
    """Return the pages of what a call stores; `notes` keep the full ones.

    Slots may be empty if sequences are padded, or if some tokens are hidden from the call. They do not stand in the
    order of their positions if a new token has taken the slot of one that was dropped.

    Raises:
        UnsupportedModel: heads hold different numbers of tokens.
    """
    store = None if site.slots is None else site.slots.store
    if store is not None and len(store.groups) > 1:
        raise UnsupportedModel(
            f"the heads of layer {site.layer} hold different numbers of tokens, and pages need equal ones; give the "
            f'other method heads="equal", or apply one of them'
        )
    is_sorted = store is None or store.is_sorted
    if is_sorted and tokens(site) is None and site.hidden_keys is None and "full" not in notes:
        return _all(site, notes, page)
    own, _ = own_positions(site)
    real = own >= 0 if site.hidden_keys is None else (own >= 0) & ~site.hidden_keys
    order = own.masked_fill(~real, torch.iinfo(own.dtype).max).argsort(-1)
    order = order.repeat_interleave(site.k.shape[1] // order.shape[1], 1)
    total, new = site.k.shape[2], site.q.shape[2]
    count = real.sum(-1)[:, 0]
    before = (real & (site.positions < site.seen - new)).sum(-1)[:, 0]

    def at(numbers: Tensor) -> Tensor:
        return order.gather(2, numbers.clamp(0, total - 1).expand(-1, order.shape[1], -1))

    if page == 1:
        number = torch.arange(total, device=order.device)[None, None]
        sizes = (number < count[:, None, None]).long()
        table = site.k.gather(2, order[..., None].expand_as(site.k))
        return StoredPages(table, sizes, 1, torch.full_like(count[:, None, None], total - 1), at)
    table = add_own_pages(notes, site.k, page, before, count, new, at)
    full = (count // page)[:, None, None]
    inside = torch.arange(page, device=order.device)
    index = at(full * page + inside)[..., None].expand(-1, -1, -1, site.k.shape[3])
    rest = (count[:, None, None] - full * page).long()
    sizes = page * (torch.arange(table.shape[2], device=order.device) < full).long()
    filling = _filling(site.k.gather(2, index), inside < rest)
    return StoredPages(torch.cat([table, filling], 2), torch.cat([sizes, rest], 2), page, full, at)


def _filling(k: Float[Tensor, "b h n d"], real: Bool[Tensor, "b 1 n"]) -> Float[Tensor, "b h 1 e"]:
    """Return the extremes of some of the keys."""
    none = ~real[..., None]
    high, low = (k.masked_fill(none, fill) for fill in (-torch.inf, torch.inf))
    return torch.cat([high.amax(2, keepdim=True), low.amin(2, keepdim=True)], -1)


def _all(site: Site, notes: dict[str, Any], page: int) -> StoredPages:
    """Return the pages of a call without padding, whose slots are all tokens."""
    k, count = site.k, site.k.shape[2]
    table, full = k, count
    if page > 1:
        table, full = add_pages(notes, k, page, count - site.q.shape[2]), count // page
    rest = count - full * page
    if rest:
        table = torch.cat([table, extremes(k[:, :, None, full * page :])], 2)
    sizes = torch.full((1, 1, table.shape[2]), page, device=k.device)
    if rest:
        sizes[..., -1] = rest
    last = torch.full((1, 1, 1), table.shape[2] - 1, device=k.device)
    return StoredPages(table, sizes, page, last, lambda own: own.clamp_max(count - 1))
