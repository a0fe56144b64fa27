"""Marks: restore a cache to an earlier length, for the next question on the same text."""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer

from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.compressed import CompressedLayer


class Mark:
    """A length of a cache that it can be restored to.

    Layers that hold all later tokens are cropped. Layers with a window or a state, which overwrite, are copied here.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache, self.seen = cache, int(cache.get_seq_length())
        self._copies = [None if _crops(layer) else copy.deepcopy(layer) for layer in cache.layers]

    def rewind(self) -> None:
        """Restore the cache to the mark."""
        for index, (layer, kept) in enumerate(zip(self.cache.layers, self._copies, strict=True)):
            if kept is not None:
                self.cache.layers[index] = copy.deepcopy(kept)
            elif layer.get_seq_length() > self.seen:
                layer.crop(self.seen - layer.get_seq_length())

    def copied(self, repeats: int = 1) -> Cache:
        """Return a copy of the cache at the mark, repeated for several sequences."""
        cache = copy.deepcopy(self.cache)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return cache


def _crops(layer: Any) -> bool:
    """Return whether removing a layer's last tokens restores it exactly."""
    if type(layer) is SlotLayer:
        return layer.window is None
    return type(layer) in (DynamicLayer, CompressedLayer)
