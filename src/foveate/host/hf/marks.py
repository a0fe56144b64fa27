"""Marks: go back in a cache to where it was, for the next question on the same text."""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer

from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.compressed import CompressedLayer


class Mark:
    """A place in a cache to go back to, once more has been read.

    Layers that hold all that came later are cropped. The others, which a window or a state makes forget, are copied
    here as they were.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache, self.seen = cache, int(cache.get_seq_length())
        self._copies = [None if _crops(layer) else copy.deepcopy(layer) for layer in cache.layers]

    def rewind(self) -> None:
        """Bring the cache back to the mark."""
        for index, (layer, kept) in enumerate(zip(self.cache.layers, self._copies, strict=True)):
            if kept is not None:
                self.cache.layers[index] = copy.deepcopy(kept)
            elif layer.get_seq_length() > self.seen:
                layer.crop(self.seen - layer.get_seq_length())

    def copied(self, repeats: int = 1) -> Cache:
        """The cache as it stands at the mark, for several sequences that go on from it."""
        cache = copy.deepcopy(self.cache)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return cache


def _crops(layer: Any) -> bool:
    """Whether a layer can forget its last tokens and be as it was before them."""
    if type(layer) is SlotLayer:
        return layer.window is None
    return type(layer) in (DynamicLayer, CompressedLayer)
