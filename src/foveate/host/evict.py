"""Drop the tokens that methods and a layer's window no longer keep, after each call."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.errors import OptionError
from foveate.host.method import Method, overrides
from foveate.host.site import Site
from foveate.host.slots.ends import Ends
from foveate.host.slots.slots import Fold


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
    # what was dropped query by query is known already
    asked = [m for m in methods if overrides(m, "keep") and (site.gone is None or overrides(m, "fold")) and m.at(site)]
    keeping = [(method, kept) for method in asked if (kept := method.keep(site)) is not None]
    folding = [m for m, _ in keeping if overrides(m, "fold")]
    fold: Fold | None = (lambda dropped, summary: folding[-1].fold(site, dropped, summary)) if folding else None
    shrinks = layer.window is not None and settled >= layer.window
    asked_all = not site.tentative and site.gone is None and not layer.padded
    if asked_all and (ends := _ends(keeping, layer.window if shrinks else None, settled)):
        dropped = layer.store.slide(ends, settled, fold)
        if dropped:
            layer._dropped_at = settled
        if dropped is not None:
            return
    keep = site.positions > settled - layer.window if shrinks and layer.window is not None else None
    if site.gone is not None:
        keep = masks.combine(keep, ~gone_at(site.gone, site.positions))
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


def gone_at(gone: Bool[Tensor, "b hkv n"], positions: Int[Tensor, "b hkv s"]) -> Bool[Tensor, "b hkv s"]:
    """Return which slots hold a token whose position is marked."""
    last = int(positions.max()) if positions.numel() else 0
    gone = F.pad(gone, (0, max(0, last + 1 - gone.shape[2])))
    return gone.gather(2, positions.clamp_min(0).long()) & (positions >= 0)


def as_mask(kept: Tensor | Ends, site: Site) -> Bool[Tensor, "b hkv s"]:
    """Convert the result of `Method.keep` to a mask."""
    return kept if isinstance(kept, Tensor) else kept.mask(site.positions, site.seen)
