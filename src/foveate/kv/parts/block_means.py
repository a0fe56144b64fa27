"""Mean keys of consecutive tokens, which stand for a block of the cache when blocks are chosen."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.host.padding import tokens
from foveate.host.site import Site


def mean_keys(site: Site, notes: dict[str, Any], past: int, first: int, size: int) -> Float[Tensor, "b hkv r d"]:
    """Return the mean keys of each sequence's tokens `first + r * size ..`, for all that the cache may have complete.

    A mean whose tokens are not all among the sequence's first `past` is meaningless: the caller leaves it out. In a
    call of one token that follows the last one, only one mean is computed anew, so that a step does not read all keys.

    Args:
        site: a call that holds all keys.
        notes: where the means of the sequence are kept.
        past: number of tokens in the batch that count, padding included.
        first: tokens of each sequence before the first mean.
        size: tokens of a mean.
    """
    count = max(0, past - first) // size
    table, before = notes.get("means"), notes.get("past")
    follows = table is not None and before == past - 1 and site.q.shape[2] == 1
    if not follows:
        own = torch.arange(first, first + count * size, device=site.k.device)
        table = _keys(site, own.expand(site.k.shape[0], -1)).unflatten(2, (count, size)).mean(3)
    elif count:
        assert table is not None
        table = F.pad(table, (0, 0, 0, count - table.shape[2])) if table.shape[2] < count else table
        found = tokens(site)
        ends = found.before(past).long() if found is not None else torch.full_like(site.begins, past)
        newest = ((ends - first) // size - 1).clamp_min(0)[:, None]  # the last mean that is complete
        own = first + newest * size + torch.arange(size, device=newest.device)
        index = newest[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        table.scatter_(2, index, _keys(site, own).mean(2, keepdim=True))
    notes["means"], notes["past"] = table, past
    assert table is not None
    return table[:, :, :count]


def _keys(site: Site, own: Tensor) -> Float[Tensor, "b hkv n d"]:
    """Gather the keys of tokens given by their positions `(B, n)` in their own sequence."""
    found = tokens(site)
    place = own if found is None else found.at(own)
    place = place.clamp_max(site.k.shape[2] - 1)
    return site.k.gather(2, place[:, None, :, None].expand(-1, site.k.shape[1], -1, site.k.shape[3]))
