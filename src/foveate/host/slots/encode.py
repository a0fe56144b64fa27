"""Encode a layer's older tokens, once it has a whole group of them beside the newest ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import UnsupportedModel
from foveate.host.slots.codec import Coding, Parts
from foveate.host.slots.codes import CHUNK, Chunk, Codes
from foveate.host.slots.group import Group
from foveate.host.slots.slots import EMPTY, Slots, packed
from foveate.host.slots.store import Store

#: Marks a token that will be removed again. It is neither encoded nor dropped.
TENTATIVE = -2
_LAST = torch.iinfo(torch.int32).max

#: Returns the positions of slots in their own sequence: `EMPTY` for padding and for empty slots, or `TENTATIVE`.
Own = Callable[[Int[Tensor, "b h s"]], Int[Tensor, "b h s"]]


def encode(store: Store, coding: Coding, own: Own, is_padded: bool, tentative: int) -> None:
    """Encode what is due, and release its copy in full precision.

    Args:
        store: the layer's slots.
        coding: how to encode.
        own: see `Own`.
        is_padded: whether some sequence is padded. Its padding is dropped: it must not enter a group of tokens.
        tentative: number of tokens that will be removed again.
    """
    for place, group in enumerate(store.groups):
        most = group.length - group.holes[0] - tentative
        if most < coding.residual + coding.group:
            continue
        if torch.is_grad_enabled() and group.slots.k.requires_grad:
            raise UnsupportedModel(
                "encoded tokens have no gradient; run the model under torch.no_grad() with a method that encodes"
            )
        is_even = not is_padded and group.holes[0] == group.holes[1]
        ranked = own(group.slots.positions)
        split = _evenly(ranked, coding, most, tentative) if is_even else _by_row(ranked, coding)
        if split is not None:
            order, taken, size, left = split
            _append(store, group, coding, order[..., :size], taken if not is_even else None)
            rest = packed(group.slots, _stays(ranked, order, taken), left[0])
            store.groups[place] = Group(group.numbers, rest, (0, left[0] - left[1]), group.summary)


#: The slots in the order of their positions, how many of each row are encoded, the most of these, and how many slots
#: the longest and the shortest row then hold in full precision.
_Split = tuple[Int[Tensor, "b h s"], Int[Tensor, "b h"], int, tuple[int, int]]


def _evenly(ranked: Int[Tensor, "b h s"], coding: Coding, count: int, tentative: int) -> _Split:
    """Split rows that all hold `count` tokens. The host need not ask the device."""
    size = (count - coding.residual) // coding.group * coding.group
    taken = torch.full(ranked.shape[:2], size, device=ranked.device)
    left = count - size + tentative
    return _in_order(ranked), taken, size, (left, left)


def _by_row(ranked: Int[Tensor, "b h s"], coding: Coding) -> _Split | None:
    """Split rows that hold different numbers of tokens; None if no row has a whole group."""
    order, count = _in_order(ranked), (ranked >= 0).sum(-1)
    taken = (count - coding.residual).clamp_min(0) // coding.group * coding.group
    stays = _stays(ranked, order, taken).sum(-1)
    # the host waits for the device here, once
    size, most, least = torch.stack([taken.max(), stays.max(), stays.min()]).tolist()
    return (order, taken, size, (most, least)) if size else None


def _in_order(ranked: Int[Tensor, "b h s"]) -> Int[Tensor, "b h s"]:
    """Return the slots in the order of their positions, then those that may not be encoded."""
    return torch.where(ranked >= 0, ranked, _LAST).argsort(dim=-1, stable=True)


def _stays(ranked: Int[Tensor, "b h s"], order: Tensor, taken: Int[Tensor, "b h"]) -> Bool[Tensor, "b h s"]:
    """Return the slots that remain in full precision: neither encoded, nor empty, nor padding."""
    numbers = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, numbers)
    return (ranked != EMPTY) & (rank >= taken[..., None])


def _append(store: Store, group: Group, coding: Coding, index: Int[Tensor, "b h n"], taken: Tensor | None) -> None:
    """Encode the slots at `index`, or the first `taken` of each row, in chunks."""
    codes = store.codes = Codes([], store.n_heads) if store.codes is None else store.codes
    tables = codes.tables(group.numbers, {name: x[:, group.heads] for name, x in coding.tables.items()})
    size = max(coding.group, CHUNK // coding.group * coding.group)
    for start in range(0, index.shape[2], size):
        part = index[..., start : start + size]
        real = torch.ones_like(part, dtype=torch.bool)
        if taken is not None:
            real = torch.arange(start, start + part.shape[2], device=part.device) < taken[..., None]
        slots = group.slots.take(part, real)
        if taken is not None:  # what fills the rest of a row must be finite
            k, v = (x.masked_fill(~real[..., None], 0.0) for x in (slots.k, slots.v))
            slots = Slots(k, v, slots.positions)
        codes.append(_chunk(group, coding, slots, tables, taken is None))


def _chunk(group: Group, coding: Coding, slots: Slots, tables: Parts, is_full: bool) -> Chunk:
    of_keys = {name: x for name, x in tables.items() if name in coding.keys.tables}
    of_values = {name: x for name, x in tables.items() if name in coding.values.tables}
    k, v = coding.keys.encode(slots.k, of_keys), coding.values.encode(slots.v, of_values)
    widths = slots.k.shape[3], slots.v.shape[3]
    bare = replace(coding, tables={})  # a chunk has the tables of its own heads
    return Chunk(tuple(group.numbers), bare, k, v, slots.positions, widths, is_full)
