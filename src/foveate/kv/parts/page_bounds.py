"""Pages of neighbouring keys: the extremes of each channel, and the largest product that a query can have with a page.

Only full pages are in the table, so that a page is read once, when its last token comes. A table is never changed in
place: copies of a sequence, and drafts that are refused, share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def extremes(k: Float[Tensor, "b h p n d"]) -> Float[Tensor, "b h p e"]:
    """Return each channel's maximum over a page, then each channel's minimum."""
    return torch.cat([k.amax(3), k.amin(3)], -1)


def page_bounds(q: Float[Tensor, "b h g d"], table: Float[Tensor, "b h p e"]) -> Float[Tensor, "b h g p"]:
    """Return the sum over channels of `max(q max, q min)`: no key of a page has a larger product with the query."""
    return torch.cat([q.clamp_min(0), q.clamp_max(0)], -1) @ table.mT


def add_pages(notes: dict[str, Any], k: Float[Tensor, "b h s d"], page: int, past: int) -> Float[Tensor, "b h p e"]:
    """Add the pages that have become full to the table in `notes`, and return it.

    Args:
        notes: notes of a layer and a sequence, or batch without padding.
        k: all keys.
        page: tokens in a page.
        past: tokens before the call. If tokens were removed since the last call, their pages are forgotten.
    """
    old, due = notes.get("pages"), k.shape[2] // page
    have = 0 if old is None else min(old.shape[2], past // page)
    parts = [] if old is None else [old[:, :, :have]]
    if due > have:
        parts.append(extremes(k[:, :, have * page : due * page].unflatten(2, (due - have, page))))
    if not parts:
        parts = [k.new_zeros(*k.shape[:2], 0, 2 * k.shape[3])]
    if old is None or len(parts) > 1 or have < old.shape[2]:
        notes["pages"] = torch.cat(parts, 2)
    notes["length"] = k.shape[2]
    return notes["pages"]


def add_own_pages(
    notes: dict[str, Any],
    k: Float[Tensor, "b h s d"],
    page: int,
    before: Int[Tensor, " b"],
    count: Int[Tensor, " b"],
    new: int,
    at: Callable[[Tensor], Tensor],
) -> Float[Tensor, "b h p e"]:
    """Add full pages to the table in `notes`, where sequences of a batch have different lengths.

    Pages that a sequence does not have, or that are not full, hold numbers without a meaning.

    Args:
        notes: notes of a layer and a batch.
        k: all keys.
        page: tokens in a page.
        before, count: tokens of each sequence before and after the call.
        new: tokens of the call, padding included.
        at: converts numbers of tokens in their own sequence, `(B, 1, n)`, to numbers of keys, `(B, 1 or H, n)`.
    """
    table, length = notes.get("pages"), k.shape[2]
    since = length if table is None else length - min(notes["length"], length - new)
    most = (since + page - 1) // page  # pages that can have become full in one sequence
    first = torch.zeros_like(before)
    if table is not None:  # without "full" there was no padding so far
        first = (before // page).clamp_max(table.shape[2])
        first = torch.minimum(first, notes["full"]) if "full" in notes else first
    number = first[:, None] + torch.arange(most, device=k.device)
    own = (number[..., None] * page + torch.arange(page, device=k.device)).flatten(1)
    index = at(own[:, None]).long()[..., None].expand(-1, k.shape[1], -1, k.shape[3])
    made = extremes(k.gather(2, index).unflatten(2, (most, page)))
    width = length // page + most + 1
    old = k.new_zeros(*k.shape[:2], 0, made.shape[-1]) if table is None else table
    room = F.pad(old, (0, 0, 0, max(0, width - old.shape[2])))
    column = number.long()[:, None, :, None].expand_as(made)
    notes["pages"] = room.scatter(2, column, made)[:, :, : length // page]
    notes["length"], notes["full"] = length, count // page
    return notes["pages"]
