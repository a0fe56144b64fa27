"""Drop the tokens that methods and a layer's window no longer keep, after each call."""

from __future__ import annotations

from functools import partial

from jaxtyping import Bool
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host.method import Method, overrides
from foveate.host.site import Site
from foveate.host.slots.ends import Ends
from foveate.host.slots.slots import Fold, Refit


def evict(site: Site, methods: list[Method]) -> None:
    """Drop the tokens that some method drops, and those that have left a sliding layer's window.

    The call's tentative tokens, which will be removed again, stay and do not count.
    """
    layer = site.slots
    assert layer is not None and layer.store is not None
    layer.padded = layer.padded or site.real is not None
    settled = layer.seen - site.tentative
    if site.tentative:
        site = site.as_of(settled)
    keeping = [(m, kept) for m in methods if overrides(m, "keep") and m.at(site) and (kept := m.keep(site)) is not None]
    fold, refit = _changes(site, [method for method, _ in keeping], methods)
    shrinks = layer.window is not None and settled >= layer.window
    slides = not site.tentative and not layer.padded and refit is None
    if slides and (ends := _ends(keeping, layer.window if shrinks else None, settled)):
        dropped = layer.store.slide(ends, settled, fold)
        if dropped:
            layer._dropped_at = settled
        if dropped is not None:
            return
    keep = site.positions > settled - layer.window if shrinks and layer.window is not None else None
    for method, kept in keeping:
        mask = as_mask(kept, site)
        if mask.shape != site.positions.shape:
            raise OptionError(
                f"keep() of {type(method).__name__} must be {tuple(site.positions.shape)}; got {tuple(mask.shape)}"
            )
        keep = mask if keep is None else keep & mask
    if keep is None:
        return
    if settled < layer.seen:
        keep = keep | (site.positions >= settled)
    if layer.store.evict(keep, fold, refit):
        layer._dropped_at = settled


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
        return None if kept[0].full else Ends(0, min(kept[0].recent, window - 1))
    return parts[0] if len(parts) == 1 else None


def as_mask(kept: Tensor | Ends, site: Site) -> Bool[Tensor, "b hkv s"]:
    """Convert the result of `Method.keep` to a mask."""
    return kept if isinstance(kept, Tensor) else kept.mask(site.positions, site.seen)
