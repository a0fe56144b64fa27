"""Take over the caches that a run works on and give them back at its end; keep the methods' notes on each cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args
from uuid import uuid4
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
from foveate.host.own_sequence import crossing

#: The notes of a run's methods, by cache: `(id of the method, layer or None) -> notes`.
Notes = WeakKeyDictionary[Cache, dict[Any, dict[str, Any]]]

#: The attribute of a cache that holds its notes by run, so that a deep copy goes on with them.
_HELD = "_foveate_notes"

#: The notes of all open runs; beam search reorders every one of them.
_OPEN_NOTES: list[Notes] = []

#: Caches of assisted decoding, from which drafted tokens are removed again.
_RECORDING: WeakSet[Cache] = WeakSet()

#: Number of prompt tokens of each cache by layer (None: every layer), once the prompt is read.
_PROMPTS: WeakKeyDictionary[Cache, dict[int | None, int]] = WeakKeyDictionary()

_activate_past_recording = Cache.activate_past_recording


class Caches:
    """The caches that one run works on.

    Args:
        evicts: whether some method drops tokens, so that layers have to store them in slots.
        in_place: whether full layers store them in slots in any case, if they can.

    Attributes:
        first: number of the first layer that attends.
    """

    def __init__(self, evicts: bool, in_place: bool) -> None:
        self.evicts, self.in_place, self.first, self.is_open = evicts, in_place, 0, False
        self.notes: Notes = WeakKeyDictionary()
        self._name = uuid4().hex

    def open(self) -> None:
        self.is_open = True
        _OPEN_NOTES.append(self.notes)
        # a plain layer does not record that assisted decoding announced itself, so we record it here
        Cache.activate_past_recording = _note_recording

    def track(self, cache: Cache) -> None:
        """Follow a cache's reorderings, and attach its layers to this run."""
        if cache not in self.notes:
            held = vars(cache).setdefault(_HELD, {})
            self.notes[cache] = held.setdefault(self._name, {})  # a deep copy of a cache has copies of its notes
            if cache not in _PROMPTS:
                _PROMPTS[cache] = {None: cache.get_seq_length()} if _is_compressed(cache) else {}
            # the bound argument makes a copy of the cache, also a saved one, reorder itself
            cache.reorder_cache = partial(_reorder_cache, cache)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, CompressedLayer) or self._replaces(layer, cache):
                cache.layers[index] = layer = slot_layer(layer, cache)
            if isinstance(layer, SlotLayer):
                layer.attach(self)
        if (self.evicts or self.in_place) and cache.layer_class_to_replicate is DynamicLayer and not cache.offloading:
            cache.layer_class_to_replicate = SlotLayer  # a module may write to other layers than its own
        if not any(tokens_seen(layer) for layer in cache.layers):
            self.notes[cache].clear()

    def _replaces(self, layer: object, cache: Cache) -> bool:
        """Return whether slots replace a layer of a cache."""
        if self.evicts:
            return is_adoptable(layer)
        return self.in_place and type(layer) is DynamicLayer and not cache.offloading

    def prepare(self, cache: Cache, index: int) -> None:
        """Prepare a layer for a call.

        Its notes are cleared at the start of a sequence. If a method evicts, slots replace its tensors.
        """
        if cache not in self.notes:
            self.track(cache)
        if self.evicts:
            while len(cache.layers) <= index:
                cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or not tokens_seen(layer):
            mine = (index, crossing(index), *[None, crossing(None)] * (index == self.first))
            forget(self.notes[cache], lambda key: key[1] in mine)
            for number in (index, *[None] * (index == self.first)):
                _PROMPTS.setdefault(cache, {}).pop(number, None)
        if not isinstance(layer, SlotLayer) and (self.evicts or (layer is not None and self._replaces(layer, cache))):
            assert layer is not None
            layer = cache.layers[index] = slot_layer(layer, cache)
        if isinstance(layer, SlotLayer):
            layer.attach(self)

    def close(self, methods: Iterable[Method], others: Iterable[Caches]) -> None:
        """Give caches back, as ordinary layers if possible. Other layers will refuse to work outside a run."""
        self.is_open = False
        _OPEN_NOTES[:] = [notes for notes in _OPEN_NOTES if notes is not self.notes]
        if not _OPEN_NOTES:
            Cache.activate_past_recording = _activate_past_recording
        mine = {id(method) for method in methods}
        for cache in list(self.notes):
            sharing = [other for other in others if cache in other.notes]
            for other in sharing:  # it still works on this cache, which has our methods' notes
                forget(other.notes[cache], lambda key: key[0] in mine)
            held = vars(cache).get(_HELD, {})
            held.pop(self._name, None)
            if not held:
                vars(cache).pop(_HELD, None)
            if not sharing:
                cache.__dict__.pop("reorder_cache", None)
                if cache.layer_class_to_replicate is SlotLayer:
                    cache.layer_class_to_replicate = DynamicLayer
                cache.layers[:] = _released(cache.layers)
        self.notes.clear()


def _released(layers: list[CacheLayerMixin]) -> list[CacheLayerMixin]:
    """Return the layers as they work without a run.

    transformers makes one mask for all layers of a kind, so that layers which hold different numbers of tokens stay
    with Foveate, and refuse to work outside a run.
    """
    found = [layer.released() if isinstance(layer, SlotLayer) else layer for layer in layers]
    full = [layer for layer in found if type(layer) in (DynamicLayer, CompressedLayer) and layer.is_initialized]
    if len({layer.keys.shape[2] for layer in full}) < 2:
        return found
    return [old if isinstance(new, CompressedLayer) else new for old, new in zip(layers, found, strict=True)]


def cache_among(values: Iterable[Any]) -> Cache | None:
    """Return the cache among a module's arguments, under any name; for an encoder-decoder, that of its decoder."""
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


def is_recording(cache: Cache) -> bool:
    """Return whether assisted decoding may remove tokens of this cache again."""
    return cache in _RECORDING


def prompt_of(cache: Cache, layer: int, past: int) -> int | None:
    """Return the number of prompt tokens if a layer has read the prompt; None while it reads.

    A cache that is cropped to before the end of its prompt reads the prompt again.
    """
    known = _PROMPTS.get(cache, {})
    prompt = known.get(layer, known.get(None))
    if prompt is None and layer < len(cache.layers):
        prompt = getattr(cache.layers[layer], "prompt", None)  # a copied cache has it here
    return prompt if prompt is not None and prompt <= past else None


def end_prompt(cache: Cache, layer: int | None, prompt: int) -> None:
    """Record the end of the prompt. Later tokens count as decoded, or as another turn of the conversation."""
    _PROMPTS.setdefault(cache, {})[layer] = prompt
    for held in cache.layers if layer is None else cache.layers[layer : layer + 1]:
        if isinstance(held, SlotLayer):
            held.prompt = prompt


def _note_recording(cache: Cache) -> None:
    _RECORDING.add(cache)
    _activate_past_recording(cache)


def _is_compressed(cache: Cache) -> bool:
    return any(
        isinstance(layer, CompressedLayer) or (isinstance(layer, SlotLayer) and not layer.is_whole)
        for layer in cache.layers
    )


def forget(notes: dict[Any, Any], matches: Callable[[Any], bool]) -> None:
    for key in [key for key in notes if matches(key)]:
        del notes[key]


_ORDINARY = (DynamicLayer, DynamicSlidingWindowLayer, CompressedLayer)
_HYBRID = get_args(Hybrid)


def is_adoptable(layer: object) -> bool:
    """Return whether slots can replace this layer."""
    return type(layer) in (*_ORDINARY, *_HYBRID)


def slot_layer(layer: CacheLayerMixin, cache: Cache) -> SlotLayer:
    """Return a layer of slots with the contents of this layer."""
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
    """Reorder a cache with the batch in beam search, and with it the notes of every open run."""
    type(cache).reorder_cache(cache, index)
    for notes in _OPEN_NOTES:
        for own in notes.get(cache, {}).values():
            for name, value in own.items():
                if isinstance(value, Cache):  # that of a second reading of the same sequences
                    value.reorder_cache(index)
                elif isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == index.shape[0]:
                    own[name] = value.index_select(0, index.to(value.device))
