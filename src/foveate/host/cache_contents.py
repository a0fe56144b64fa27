"""Count the contents of a cache."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from foveate.host.hf.cache import SlotLayer, tokens_seen


@dataclass(frozen=True)
class Held:
    """The contents of a cache at this moment.

    Args:
        stored: slots that are stored, over layers, batch and heads.
        full: slots that a full cache would hold.
        nbytes: bytes of keys and values, or of their codes, in memory.
        needed_bytes: bytes without the room at the end of buffers.
        full_bytes: bytes that a full cache would hold.
    """

    stored: int = 0
    full: int = 0
    nbytes: int = 0
    needed_bytes: int = 0
    full_bytes: int = 0

    @property
    def kept(self) -> float:
        """Share of the full cache's bytes that is stored."""
        return self.needed_bytes / self.full_bytes if self.full_bytes else 1.0

    def __add__(self, other: Held) -> Held:
        return Held(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def held(cache: Cache) -> Held:
    """Count the contents of a cache, inside a block or outside it. Layers that keep a state do not count."""
    return sum((_held(layer) for layer in cache.layers), Held())


def _held(layer: object) -> Held:
    if isinstance(layer, SlotLayer):
        if (store := layer.store) is None:
            return Held()
        full = store.rows * layer.seen
        return Held(store.stored, full, layer.nbytes, store.needed_bytes, full * store.token_bytes)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4:
        return Held()
    rows, n = keys.shape[0] * keys.shape[1], tokens_seen(layer)
    size = keys.element_size() * keys.shape[3] + values.element_size() * values.shape[3]
    stored = rows * min(keys.shape[2], n)
    return Held(stored, rows * n, keys.nbytes + values.nbytes, stored * size, rows * n * size)
