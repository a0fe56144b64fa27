"""Numbers that a policy keeps of each stored token from call to call, through eviction, reordering and new tokens.

They stand in `site.notes`, beside the tokens' positions: slots may move when tokens are dropped, positions do not.
While no slot has moved, each number stands at its slot. After a move they are found by their positions. Beam search
reorders both. What was noted of a token that is gone is forgotten at the next call.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from foveate.host.site import Site

Notes = dict[str, Any]


def add(notes: Notes, site: Site, numbers: Float[Tensor, "b hkv s"]) -> None:
    """Add numbers to those of each slot of the call. New tokens begin at zero, also after others were removed again."""
    old = site.positions < site.seen - site.q.shape[2]
    added = torch.where(old, find(notes, site), 0.0) + numbers.float()
    _put(notes, site, added, site.positions >= 0, site.positions.shape[2])
    site.step[_found(notes)] = added, site.positions


def put(notes: Notes, site: Site, numbers: Float[Tensor, "b hkv s"], where: Bool[Tensor, "b hkv s"]) -> None:
    """Store the numbers of some slots, and forget all others."""
    _put(notes, site, numbers, where, site.positions.shape[2])


def find(notes: Notes, site: Site) -> Float[Tensor, "b hkv s"]:
    """Return the number of each slot of the call; zero for tokens without one."""
    numbers, positions = site.step.get(_found(notes), (None, None))
    if positions is site.positions:  # added in this call, and no slot has moved since
        return numbers
    positions = site.positions.to(torch.int32)
    if "positions" not in notes:
        return torch.zeros(positions.shape, device=positions.device)
    known, numbers = notes["positions"], notes["numbers"]
    if notes["layout"] is not None:
        if notes["layout"] == _layout(site):  # new tokens took empty slots, or stand at the end
            still = torch.where(known == positions[..., : known.shape[-1]], numbers, 0.0)
            return F.pad(still, (0, positions.shape[-1] - known.shape[-1]))
        known, order = known.sort(dim=-1)
        numbers = numbers.gather(-1, order)
    index = torch.searchsorted(known, positions.contiguous()).clamp_max(known.shape[-1] - 1)
    return numbers.gather(-1, index).masked_fill(known.gather(-1, index) != positions, 0.0)


def trim(notes: Notes, site: Site, kept: Bool[Tensor, "b hkv s"], most: int) -> None:
    """Forget the tokens that are dropped after the call; a head keeps `most` tokens at most."""
    _put(notes, site, find(notes, site), kept, most)


def _found(notes: Notes) -> tuple[str, int]:
    return "numbers of the slots", id(notes)


def _layout(site: Site) -> tuple[object, ...] | None:
    store = None if site.slots is None else site.slots.store
    return None if store is None else store.layout


def _put(notes: Notes, site: Site, numbers: Tensor, where: Tensor, most: int) -> None:
    """Store numbers at their slots, or, if few slots stay, in the order of their positions, empty slots last."""
    site.step.pop(_found(notes), None)
    positions = site.positions.to(torch.int32).masked_fill(~where, torch.iinfo(torch.int32).max)
    notes["layout"] = _layout(site) if 2 * most >= positions.shape[-1] else None
    if notes["layout"] is None:
        positions, order = positions.sort(dim=-1)
        positions, numbers = positions[..., :most].clone(), numbers.gather(-1, order[..., :most])
    notes["positions"], notes["numbers"] = positions, numbers
