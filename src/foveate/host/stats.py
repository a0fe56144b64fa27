"""What methods did to a model's attention, counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from foveate.host.site import Site


@dataclass
class Stats:
    """What a run has done so far.

    Args:
        calls: attention calls.
        seconds: time in attention.
        kept: share of the full cache's slots that are stored, at the last call (1.0 where nothing is evicted).
        read: mean share of the keys that decoding queries read.
        cache_bytes: bytes of keys and values that are stored.
        cache_peak: the most that were, those of the layer at work before it evicts included.
    """

    calls: int = 0
    seconds: float = 0.0
    cache_peak: int = 0
    _layers: dict[int, tuple[int, int, int]] = field(default_factory=dict, repr=False)
    _reads: list[float] = field(default_factory=list, repr=False)

    @property
    def kept(self) -> float:
        full = sum(full for _, full, _ in self._layers.values())
        return sum(stored for stored, _, _ in self._layers.values()) / full if full else 1.0

    @property
    def read(self) -> float:
        return sum(self._reads) / len(self._reads) if self._reads else 1.0

    @property
    def cache_bytes(self) -> int:
        return sum(size for _, _, size in self._layers.values())

    def note(self, site: Site, density: float, held: int, seconds: float) -> None:
        """Count a call that is over.

        Args:
            site: the call.
            density: share of the keys at hand that were read.
            held: slots of this layer that attention ran over, before any were dropped.
            seconds: what it took.
        """
        self.calls += 1
        self.seconds += seconds
        b, hkv, _, width = site.new_k.shape
        full, stored = b * hkv * site.seen, slots_of(site)
        size = site.new_k.element_size() * (width + site.new_v.shape[-1])
        self._layers[id(site.module)] = (min(stored, full), full, stored * size)
        self.cache_peak = max(self.cache_peak, self.cache_bytes + (held - stored) * size)
        if site.phase == "decode":
            self._reads.append(density * min(1.0, held / full))


def slots_of(site: Site) -> int:
    """Slots that a layer stores, over batch and heads."""
    if site.slots is not None and site.slots.store is not None:
        return site.slots.store.stored
    b, hkv, n, _ = site.new_k.shape
    return b * hkv * n
