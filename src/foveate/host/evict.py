"""Drop the tokens that methods and a layer's window no longer keep, and encode those that stay.

This happens after each call. Methods that compare layers choose when a whole pass has ended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.errors import OptionError
from foveate.host.method import Method, overrides
from foveate.host.padding import tokens
from foveate.host.pass_end import PassEnd, Reread
from foveate.host.site import Site
from foveate.host.slots.encode import TENTATIVE, encode
from foveate.host.slots.ends import AT_END, Ends
from foveate.host.slots.slots import Fold, Refit


def evict(site: Site, methods: list[Method], at_end: Callable[[Site, list[Method]], None]) -> None:
    """Drop the tokens that some method drops, and those that have left a sliding layer's window; then encode.

    The call's tentative tokens, which will be removed again, stay and do not count. `at_end(call, methods)` is called
    if methods choose when the whole pass has ended. What they leave is encoded after the next call.
    """
    later = _drop_due(site, methods)
    encoding = [m for m in methods if overrides(m, "encode") and m.at(site)]
    if later:
        at_end(site.as_of(site.seen - site.tentative).released(), later)
    elif encoding:
        site = site.refreshed()
        _encode(site.as_of(site.seen - site.tentative) if site.tentative else site, encoding)


def _encode(site: Site, methods: list[Method]) -> None:
    """Encode the tokens that are due by the coding that a method chooses. `site.seen` counts settled tokens only."""
    layer = site.slots
    assert layer is not None and layer.store is not None
    chosen = [(method, coding) for method in methods if (coding := method.encode(site)) is not None]
    if not chosen:
        return
    if len(chosen) > 1:
        one, two = (type(method).__name__ for method, _ in chosen[:2])
        raise OptionError(f"{one} and {two} both encode layer {site.layer}; give each its own layers=, or apply one")
    found = tokens(site) if site.real is not None else None

    def own(positions: Tensor) -> Tensor:
        later = positions >= site.seen
        return (positions if found is None else found.own(positions)).masked_fill(later, TENTATIVE)

    encode(layer.store, chosen[0][1], own, found is not None, layer.seen - site.seen)


def _drop_due(site: Site, methods: list[Method]) -> list[Method]:
    """Drop what is due, and return the methods that choose when the whole pass has ended."""
    layer = site.slots
    assert layer is not None and layer.store is not None
    layer.padded = layer.padded or site.real is not None
    settled = layer.seen - site.tentative
    if site.tentative:
        site = site.as_of(settled)
    # what methods chose query by query is known already
    drops = site.drops
    asked = [m for m in methods if overrides(m, "keep") and (drops is None or changes(m)) and m.at(site)]
    chosen = [(method, method.keep(site)) for method in asked]
    later = [*(() if drops is None else drops.at_end), *(method for method, kept in chosen if kept is AT_END)]
    keeping = [(method, kept) for method, kept in chosen if isinstance(kept, Tensor | Ends)]
    fold, refit = _changes(site, [method for method, _ in keeping], methods)
    if later and refit is not None:
        raise OptionError(
            f"{type(later[0]).__name__} chooses when the whole pass has ended, and another method changes what stays "
            f"at each call; apply one of them"
        )
    shrinks = layer.window is not None and settled >= layer.window
    gone = None if drops is None else drops.gone
    slides = not site.tentative and gone is None and refit is None and not layer.padded
    if slides and (ends := _ends(keeping, layer.window if shrinks else None, settled)):
        dropped = layer.store.slide(ends, settled, fold)
        if dropped:
            layer._dropped_at = settled
        if dropped is not None:
            return later
    keep = site.positions > settled - layer.window if shrinks and layer.window is not None else None
    if gone is not None:
        keep = masks.combine(keep, ~gone_at(gone, site.positions))
    for method, kept in keeping:
        mask = as_mask(kept, site)
        if mask.shape != site.positions.shape:
            raise OptionError(
                f"keep() of {type(method).__name__} must be {tuple(site.positions.shape)}; got {tuple(mask.shape)}"
            )
        keep = mask if keep is None else keep & mask
    if keep is not None:
        _drop(site, keep, fold, refit)
    return later


def evict_at_end(ended: list[tuple[Site, list[Method]]], ids: Tensor | None, reread: Reread) -> None:
    """Drop the tokens that methods choose when a whole pass has ended.

    Args:
        ended: the layers' calls, released, each with the methods that choose there.
        ids: the pass's tokens that will stay; None if they are unknown.
        reread: see `PassEnd`.
    """
    methods = list(dict.fromkeys(method for _, choosing in ended for method in choosing))
    shared: dict[object, object] = {}
    for method in methods:
        sites = [site for site, choosing in ended if method in choosing]
        for site, keep in zip(sites, method.keep_all(PassEnd(sites, ids, reread, shared)), strict=True):
            if keep is not None:
                # slots may have moved since the call; positions have not
                gone = mark(None, site, ~keep)
                now = copy.copy(site)
                now.__dict__.pop("positions")
                _drop(now, ~gone_at(gone, now.positions))


def _drop(site: Site, keep: Bool[Tensor, "b hkv s"], fold: Fold | None = None, refit: Refit | None = None) -> None:
    """Keep some slots of a layer, and the tokens that will be removed again."""
    layer = site.slots
    assert layer is not None and layer.store is not None
    if site.seen < layer.seen:
        keep = keep | (site.positions >= site.seen)
    if layer.store.evict(keep, fold, refit):
        layer._dropped_at = site.seen


def mark(gone: Bool[Tensor, "b hkv n"] | None, site: Site, slots: Bool[Tensor, "b hkv s"]) -> Bool[Tensor, "b hkv n"]:
    """Mark the positions of some slots, beside those that are marked already."""
    positions = site.positions
    old = positions.new_zeros((*positions.shape[:2], 0), dtype=torch.bool) if gone is None else gone
    old = F.pad(old, (0, site.seen - old.shape[2]))
    slots = slots & (positions >= 0) & (positions < site.seen)
    index = positions.clamp(0, site.seen - 1).long()
    return old | (torch.zeros_like(old, dtype=torch.int32).scatter_add_(2, index, slots.int()) > 0)


def changes(method: Method) -> bool:
    """Return whether a method changes what is stored beyond dropping it."""
    return overrides(method, "fold") or overrides(method, "refit")


def _changes(site: Site, keeping: list[Method], methods: list[Method]) -> tuple[Fold | None, Refit | None]:
    """Return what the last method that does so makes of the slots that are dropped, and of those that stay.

    A method that drops nothing itself may refit what others leave.
    """
    folding = [m for m in keeping if overrides(m, "fold")]
    refitting = [
        m for m in methods if overrides(m, "refit") and (m in keeping or not overrides(m, "keep")) and m.at(site)
    ]
    fold: Fold | None = partial(folding[-1].fold, site) if folding else None
    refit: Refit | None = partial(refitting[-1].refit, site) if refitting else None
    return fold, refit


def _ends(keeping: list[tuple[Method, Tensor | Ends]], window: int | None, seen: int) -> Ends | None:
    """Combine what several methods and a layer's window keep; None if `Ends` cannot express it."""
    kept = [what for _, what in keeping if isinstance(what, Ends)]
    if len(kept) < len(keeping):
        return None
    parts = [*kept, *([] if window is None else [Ends(0, window - 1)])]
    if len(parts) == 2 and window is not None and seen - window + 1 >= kept[0].sink:  # the sinks have left the window
        return None if kept[0].full or kept[0].by_head else Ends(0, min(kept[0].recent, window - 1))
    return parts[0] if len(parts) == 1 else None


def gone_at(gone: Bool[Tensor, "b hkv n"], positions: Int[Tensor, "b hkv s"]) -> Bool[Tensor, "b hkv s"]:
    """Return which slots hold a token whose position is marked."""
    last = int(positions.max()) if positions.numel() else 0
    gone = F.pad(gone, (0, max(0, last + 1 - gone.shape[2])))
    return gone.gather(2, positions.clamp_min(0).long()) & (positions >= 0)


def as_mask(kept: Tensor | Ends, site: Site) -> Bool[Tensor, "b hkv s"]:
    """Convert the result of `Method.keep` to a mask."""
    return kept if isinstance(kept, Tensor) else kept.mask(site.positions, site.seen)
