"""The caches that a run works on: taken over while it lasts, then handed back; and what methods remember of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.cache import SlotLayer, tokens_seen
from foveate.host.hf.compressed import CompressedLayer
from foveate.host.hf.hybrid import Hybrid, HybridSlotLayer
from foveate.host.method import Method

#: Memories of methods by cache, of every run that is open: `(id of the method, layer or None) -> what it noted`.
Memories = WeakKeyDictionary[Cache, dict[Any, dict[str, Any]]]

#: The memories of the runs that are open, so that beam search moves all of them along.
_ALL: list[Memories] = []

#: Caches of assisted decoding, from which drafted tokens are taken back.
_RECORDING: WeakSet[Cache] = WeakSet()

#: Tokens of each cache's prompt by layer (None: of every layer), once it was read: what comes later is no prompt.
_PROMPTS: WeakKeyDictionary[Cache, dict[int | None, int]] = WeakKeyDictionary()

_activate_past_recording = Cache.activate_past_recording


class Caches:
    """The caches that one run works on.

    Args:
        evicts: whether some method drops tokens, so that layers have to store them slot by slot.
        in_place: whether full layers store them so in any case, where that can be.

    Attributes:
        first: number of the first layer that attends.
    """

    def __init__(self, evicts: bool, in_place: bool) -> None:
        self.evicts, self.in_place, self.first, self.is_open = evicts, in_place, 0, False
        self.memories: Memories = WeakKeyDictionary()

    def open(self) -> None:
        self.is_open = True
        _ALL.append(self.memories)
        # a plain layer leaves no trace of assisted decoding's announcement, so that it has to be overheard
        Cache.activate_past_recording = _overheard

    def meet(self, cache: Cache) -> None:
        """Follow a cache's reorderings, and mark its layers as ours while the run lasts."""
        if cache not in self.memories:
            self.memories[cache] = {}
            if cache not in _PROMPTS:
                _PROMPTS[cache] = {None: cache.get_seq_length()} if _is_compressed(cache) else {}
            # bound so that a copy of the cache, also a saved one, reorders itself
            cache.reorder_cache = partial(_reorder_cache, cache)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, CompressedLayer) or self._takes(layer, cache):
                cache.layers[index] = layer = slot_layer(layer, cache)
            if isinstance(layer, SlotLayer):
                layer.attach(self)
        if (self.evicts or self.in_place) and cache.layer_class_to_replicate is DynamicLayer and not cache.offloading:
            cache.layer_class_to_replicate = SlotLayer  # a layer may write into others than its own
        if not any(tokens_seen(layer) for layer in cache.layers):
            self.memories[cache].clear()

    def _takes(self, layer: object, cache: Cache) -> bool:
        """Whether slots stand in for a layer, as far as they can."""
        if self.evicts:
            return is_adoptable(layer)
        return self.in_place and type(layer) is DynamicLayer and not cache.offloading

    def adopt(self, cache: Cache, index: int) -> None:
        """Make a layer ready for a call: begin its memories with its sequence, and put slots in place of its tensors
        where a method evicts.
        """
        if cache not in self.memories:
            self.meet(cache)
        if self.evicts:
            while len(cache.layers) <= index:
                cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or not tokens_seen(layer):
            forget(self.memories[cache], lambda key: key[1] == index or (key[1] is None and index == self.first))
            for begun in (index, *[None] * (index == self.first)):
                _PROMPTS.setdefault(cache, {}).pop(begun, None)
        if not isinstance(layer, SlotLayer) and (self.evicts or (layer is not None and self._takes(layer, cache))):
            assert layer is not None
            layer = cache.layers[index] = slot_layer(layer, cache)
        if isinstance(layer, SlotLayer):
            layer.attach(self)

    def close(self, methods: Iterable[Method], others: Iterable[Caches]) -> None:
        """Hand caches back, as ordinary layers where that can be; others will refuse to go on alone."""
        self.is_open = False
        _ALL[:] = [memories for memories in _ALL if memories is not self.memories]
        if not _ALL:
            Cache.activate_past_recording = _activate_past_recording
        mine = {id(method) for method in methods}
        for cache in list(self.memories):
            sharing = [other for other in others if cache in other.memories]
            for other in sharing:  # it still works on this cache, with what our methods remembered
                forget(other.memories[cache], lambda key: key[0] in mine)
            if not sharing:
                cache.__dict__.pop("reorder_cache", None)
                if cache.layer_class_to_replicate is SlotLayer:
                    cache.layer_class_to_replicate = DynamicLayer
                cache.layers[:] = [x.released() if isinstance(x, SlotLayer) else x for x in cache.layers]
        self.memories.clear()


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache among a module's arguments, whatever it is called; an encoder-decoder's is that of its decoder."""
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


def is_recording(cache: Cache) -> bool:
    """Whether assisted decoding may take tokens of this cache back."""
    return cache in _RECORDING


def prompt_of(cache: Cache, layer: int, past: int) -> int | None:
    """Tokens of the prompt, where a layer has read it; None while it reads. A cache that is cropped to before the end
    of its prompt reads again.
    """
    known = _PROMPTS.get(cache, {})
    prompt = known.get(layer, known.get(None))
    if prompt is None and layer < len(cache.layers):
        prompt = getattr(cache.layers[layer], "prompt", None)  # of the cache that this one was copied from
    return prompt if prompt is not None and prompt <= past else None


def end_prompt(cache: Cache, layer: int | None, prompt: int) -> None:
    """From here on tokens count as decoded, or as a further turn."""
    _PROMPTS.setdefault(cache, {})[layer] = prompt
    for held in cache.layers if layer is None else cache.layers[layer : layer + 1]:
        if isinstance(held, SlotLayer):
            held.prompt = prompt


def _overheard(cache: Cache) -> None:
    _RECORDING.add(cache)
    _activate_past_recording(cache)


def _is_compressed(cache: Cache) -> bool:
    return any(
        isinstance(layer, CompressedLayer) or (isinstance(layer, SlotLayer) and not layer.is_whole)
        for layer in cache.layers
    )


def forget(memories: dict[Any, Any], gone: Callable[[Any], bool]) -> None:
    for key in [key for key in memories if gone(key)]:
        del memories[key]


_ORDINARY = (DynamicLayer, DynamicSlidingWindowLayer, CompressedLayer)
_HYBRID = get_args(Hybrid)


def is_adoptable(layer: object) -> bool:
    """Whether slots can stand in for this layer."""
    return type(layer) in (*_ORDINARY, *_HYBRID)


def slot_layer(layer: CacheLayerMixin, cache: Cache) -> SlotLayer:
    """A layer of slots that takes over what this one holds."""
    if not is_adoptable(layer) or cache.offloading:
        if type(cache) is DynamicCache and not cache.offloading:
            raise UnsupportedModel(
                f"a method that evicts takes caches of keys and values alone; got {type(layer).__name__}"
            )
        kind = "offloading " * cache.offloading + f"{type(cache).__name__} of {type(layer).__name__}"
        raise UnsupportedModel(
            f"past_key_values must be a DynamicCache for a method that evicts; got {kind}: "
            "leave cache_implementation out"
        )
    return HybridSlotLayer(layer) if isinstance(layer, _HYBRID) else SlotLayer(layer)


def _reorder_cache(cache: Cache, index: Tensor) -> None:
    """Beam search moves the batch: move the cache, and what the methods of every open run remember of it."""
    type(cache).reorder_cache(cache, index)
    for memories in _ALL:
        for memory in memories.get(cache, {}).values():
            for name, value in memory.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == index.shape[0]:
                    memory[name] = value.index_select(0, index.to(value.device))
