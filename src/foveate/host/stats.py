"""Statistics of a run: counts of attention calls, stored slots and reads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers.cache_utils import Cache

from foveate.host.hf.cache import SlotLayer, tokens_seen
from foveate.host.site import Site


@dataclass
class LayerStats:
    """Statistics of one layer of one sequence (or batch): the contents of its cache, and the cost of its calls.

    Args:
        layer: the layer's number in the cache.
        calls: attention calls.
        seconds: time in attention.
        seen: slots that a full cache would hold, over batch and heads.
        stored: slots that are stored.
        bytes: bytes of keys, values and weights that are stored.
        read: sum over decoding calls of the share of keys that was read.
        decodes: decoding calls.
    """

    layer: int
    calls: int = 0
    seconds: float = 0.0
    seen: int = 0
    stored: int = 0
    bytes: int = 0
    read: float = 0.0
    decodes: int = 0

    @property
    def kept(self) -> float:
        """Share of the full cache's slots that are stored."""
        return self.stored / self.seen if self.seen else 1.0


@dataclass
class CacheStats:
    """All layers of one cache, by number.

    Args:
        layers: each layer's figures.
        cache_bytes: bytes of keys, values and weights that are stored.
    """

    layers: dict[int, LayerStats] = field(default_factory=dict)
    cache_bytes: int = 0

    @property
    def kept(self) -> float:
        """Share of the full cache's slots that are stored, over all layers; 1.0 if nothing is evicted."""
        full = sum(layer.seen for layer in self.layers.values())
        return sum(layer.stored for layer in self.layers.values()) / full if full else 1.0

    @property
    def read(self) -> float:
        """Mean share of the keys that decoding queries read."""
        decodes = sum(layer.decodes for layer in self.layers.values())
        return sum(layer.read for layer in self.layers.values()) / decodes if decodes else 1.0


class Stats:
    """The statistics of a run so far. Any thread may read them while it runs.

    `kept` and `cache_bytes` are those of the cache that was used last; `of(cache)` gives those of any other. `read`,
    `calls` and `seconds` cover all calls of the run.

    Attributes:
        calls: attention calls.
        seconds: time in attention.
        cache_peak: the most bytes that a cache held, including those of a layer before it evicts.
    """

    def __init__(self) -> None:
        self.calls, self.seconds, self.cache_peak = 0, 0.0, 0
        self._reads, self._decodes = 0.0, 0
        self._caches: WeakKeyDictionary[Cache, CacheStats] = WeakKeyDictionary()
        self._without, self._latest = CacheStats(), CacheStats()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"Stats(calls={self.calls}, seconds={self.seconds:.3f}, kept={self.kept:.3f}, read={self.read:.3f}, "
            f"cache_bytes={self.cache_bytes}, cache_peak={self.cache_peak})"
        )

    @property
    def kept(self) -> float:
        """Share of the full cache's slots that are stored, at the last call."""
        return self._latest.kept

    @property
    def read(self) -> float:
        """Mean share of the keys that decoding queries read."""
        return self._reads / self._decodes if self._decodes else 1.0

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and weights that are stored, at the last call."""
        return self._latest.cache_bytes

    @property
    def layers(self) -> list[LayerStats]:
        """The layers of the cache that was used last."""
        return [self._latest.layers[number] for number in sorted(self._latest.layers)]

    def table(self) -> list[dict[str, float]]:
        """Return one row for each layer of the cache that was used last, for a data frame or a print."""
        with self._lock:
            return [
                {
                    "layer": layer.layer, "calls": layer.calls, "seconds": layer.seconds, "kept": layer.kept,
                    "bytes": layer.bytes, "read": layer.read / layer.decodes if layer.decodes else 1.0,
                }
                for layer in self.layers
            ]  # fmt: skip

    def of(self, cache: Cache) -> CacheStats:
        """Return the statistics of one cache; they are empty for a cache that the run has not used."""
        return self._caches.get(cache, CacheStats())

    def note(self, site: Site, density: float, held: int, seconds: float) -> None:
        """Count a finished call.

        Args:
            site: the call.
            density: share of the stored keys that were read.
            held: slots of this layer that attention read from, before any were dropped.
            seconds: the time it took.
        """
        k, v = _cached(site)
        rows, size = k.shape[0] * k.shape[1], k.element_size() * (k.shape[-1] + v.shape[-1])
        if site.slots is not None and site.slots.store is not None:
            rows, stored = k.shape[0] * site.slots.store.n_heads, site.slots.store.stored
            weights = site.slots.store.weight_bytes
        else:
            stored, weights = rows * k.shape[2], 0
        full = rows * site.seen
        share = density * min(1.0, held / full) if site.phase == "decode" else None
        nbytes = stored * size + weights
        self._note(site.cache, site.layer, full, stored, nbytes, share, (held - stored) * size, seconds)

    def note_drops(self, site: Site) -> None:
        """Count again what a layer stores, after tokens were dropped since its call."""
        k, v = _cached(site)
        with self._lock:
            found = self._found(site.cache)
            layer, stored = found.layers[site.layer], slots_of(site)
            size = k.element_size() * (k.shape[-1] + v.shape[-1])
            found.cache_bytes += stored * size - layer.bytes
            layer.stored, layer.bytes = min(stored, layer.seen), stored * size

    def note_native(
        self, cache: Cache | None, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: SlotLayer | None, seconds: float
    ) -> None:
        """Count a call in which no method took part."""
        batch, heads, seen, width = k.shape
        rows, size, stored = batch * heads, k.element_size() * (width + v.shape[-1]), batch * heads * seen
        read, weights = stored, 0
        if slots is not None and slots.store is not None:
            seen, rows, stored = slots.seen, batch * slots.store.n_heads, slots.store.stored
            read, weights = stored, slots.store.weight_bytes
        elif cache is not None and layer < len(cache.layers):
            seen = max(seen, tokens_seen(cache.layers[layer]))
            keys = getattr(cache.layers[layer], "keys", None)  # a layer with a window stores fewer than it read
            if isinstance(keys, Tensor) and keys.dim() == 4:
                stored = min(stored, rows * keys.shape[2])
        share = min(1.0, read / (rows * seen)) if q.shape[2] == 1 and seen > 1 else None
        self._note(cache, layer, rows * seen, stored, stored * size + weights, share, 0, seconds)

    def _note(
        self, cache: object, number: int, full: int, stored: int, nbytes: int, share: float | None, extra: int,
        seconds: float,
    ) -> None:  # fmt: skip
        with self._lock:
            self.calls, self.seconds = self.calls + 1, self.seconds + seconds
            found = self._found(cache)
            layer = found.layers.get(number)
            if layer is None:
                layer = found.layers[number] = LayerStats(number)
            layer.calls, layer.seconds = layer.calls + 1, layer.seconds + seconds
            found.cache_bytes += nbytes - layer.bytes
            layer.seen, layer.stored, layer.bytes = full, min(stored, full), nbytes
            if isinstance(cache, Cache) or not self._caches:  # attention to an encoder does not replace the decoder's
                self._latest = found
            self.cache_peak = max(self.cache_peak, found.cache_bytes + extra)
            if share is not None:
                layer.read, layer.decodes = layer.read + share, layer.decodes + 1
                self._reads, self._decodes = self._reads + share, self._decodes + 1

    def _found(self, cache: object) -> CacheStats:
        if not isinstance(cache, Cache):
            return self._without
        found = self._caches.get(cache)
        if found is None:
            found = self._caches[cache] = CacheStats()
        return found


@dataclass(frozen=True)
class Held:
    """The contents of a cache at this moment.

    Args:
        stored: slots that are stored, over layers, batch and heads.
        full: slots that a full cache would hold.
        nbytes: bytes of keys, values and weights in memory.
    """

    stored: int
    full: int
    nbytes: int

    @property
    def kept(self) -> float:
        """Share of the full cache's slots that are stored."""
        return self.stored / self.full if self.full else 1.0


def held(cache: Cache) -> Held:
    """Count the contents of a cache, inside a block or outside it. Layers that keep a state do not count."""
    stored = full = nbytes = 0
    for layer in cache.layers:
        if isinstance(layer, SlotLayer):
            if layer.store is not None:
                rows = layer.store.rows
                stored, full, nbytes = stored + layer.store.stored, full + rows * layer.seen, nbytes + layer.nbytes
            continue
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4:
            rows, n = keys.shape[0] * keys.shape[1], int(layer.get_seq_length())
            stored, full = stored + rows * min(keys.shape[2], n), full + rows * n
            nbytes += keys.nbytes + values.nbytes
    return Held(stored, full, nbytes)


def _cached(site: Site) -> tuple[Tensor, Tensor]:
    """Return keys and values as the cache holds them, or those of the call if there is no cache."""
    if site.slots is not None and site.slots.store is not None:
        slots = site.slots.store.groups[0].slots
        return slots.k, slots.v
    layers = getattr(site.cache, "layers", ())
    keys = getattr(layers[site.layer], "keys", None) if site.layer < len(layers) else None
    if isinstance(keys, Tensor) and keys.dim() == 4:
        return keys, layers[site.layer].values
    return site.new_k, site.new_v


def slots_of(site: Site) -> int:
    """Count the slots that a layer stores, over batch and heads."""
    if site.slots is not None and site.slots.store is not None:
        return site.slots.store.stored
    b, hkv, n, _ = _cached(site)[0].shape
    return b * hkv * n
