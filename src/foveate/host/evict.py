"""Drop the tokens that methods and a layer's window no longer keep, after each call, and encode those that stay."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host.method import Method, overrides
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.host.slots.encode import TENTATIVE, encode
from foveate.host.slots.ends import Ends
from foveate.host.slots.slots import Fold


def evict(site: Site, methods: list[Method]) -> None:
    """Drop the tokens that some method drops, and those that have left a sliding layer's window; then encode.

    The call's tentative tokens, which will be removed again, stay and do not count.
    """
    _drop(site, methods)
    encoding = [m for m in methods if overrides(m, "encode") and m.at(site)]
    if encoding:
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


def _drop(site: Site, methods: list[Method]) -> None:
    layer = site.slots
    assert layer is not None and layer.store is not None
    layer.padded = layer.padded or site.real is not None
    settled = layer.seen - site.tentative
    if site.tentative:
        site = site.as_of(settled)
    keeping = [(m, kept) for m in methods if overrides(m, "keep") and m.at(site) and (kept := m.keep(site)) is not None]
    folding = [m for m, _ in keeping if overrides(m, "fold")]
    fold: Fold | None = (lambda dropped, summary: folding[-1].fold(site, dropped, summary)) if folding else None
    shrinks = layer.window is not None and settled >= layer.window
    if not site.tentative and not layer.padded and (ends := _ends(keeping, layer.window if shrinks else None, settled)):
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
    if layer.store.evict(keep, fold):
        layer._dropped_at = settled


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
