"""A transformers cache layer that may drop tokens: it counts the tokens seen and the tokens stored separately."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.compressed import CompressedLayer
from foveate.host.slots.store import Store

#: The layer that was updated last, per thread. The next attention call belongs to it.
LATEST = threading.local()


class Kept(NamedTuple):
    """The tokens that are left of a call.

    Args:
        positions: their positions in the sequence, `(B, N)`; `EMPTY` in rows that hold fewer.
        empty: the least and the largest number of empty entries in a row.
        tokens: tokens that the call reads, dropped ones included.
    """

    positions: Tensor
    empty: tuple[int, int]
    tokens: int


class SlotLayer(CacheLayerMixin):
    """A layer of slots that replaces a `DynamicLayer` while a method evicts.

    Positions stay right, since `get_seq_length` is the number of tokens seen. Masks cover the whole span `0..seen` and
    are read at the stored positions. Reordering, repeating and selecting in the batch work. The layer can be cropped to
    any length since which nothing was dropped.

    Attributes:
        seen: tokens of the sequence so far.
        store: the slots; None before the first token.
        window: tokens that a sliding layer sees; None for a full layer.
        attached: whether a run is open on this cache, or on the cache that it was copied from.
        padded: whether some sequence had padding.
        prompt: tokens of the prompt, once it is read; a copy of the cache copies this too.
        shift: how much earlier the positions of later tokens are, `(B,)`, since dropped tokens do not count; None for
            not at all.
        is_followed: whether the positions of the next update follow `shift`.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, native: CacheLayerMixin | None = None) -> None:
        super().__init__()
        native = DynamicLayer() if native is None else native
        sliding = isinstance(native, DynamicSlidingWindowLayer)
        self.is_sliding = sliding
        self.window: int | None = native.sliding_window if isinstance(native, DynamicSlidingWindowLayer) else None
        self.seen = int(native.get_seq_length())
        self.store: Store | None = None
        self.padded, self.record_past = False, bool(getattr(native, "record_past", False))
        self._runs: list[weakref.ref[Any]] = []
        self._dropped_at = 0  # tokens seen at the last drop
        self.prompt: int | None = None
        self.shift: Tensor | None = None
        self.is_followed = False
        self._kept: Kept | None = None
        self._returned: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        if native.is_initialized and native.keys is not None and native.keys.numel():
            self._take_over(native, native.keys, native.values)

    def _take_over(self, native: CacheLayerMixin, keys: Tensor, values: Tensor | None) -> None:
        assert values is not None
        self.lazy_initialization(keys, values)
        assert self.store is not None
        self.store.append(keys, values, self.seen - keys.shape[2])
        if isinstance(native, CompressedLayer):
            self.store.groups[0].slots.positions.copy_(native.positions)
            self._dropped_at = native.compressed_at

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = Store.empty(key_states, value_states)
        self.is_initialized = True

    @property
    def attached(self) -> bool:
        return any((run := ref()) is not None and run.is_open for ref in self._runs)

    def attach(self, run: Any) -> None:
        """Belong to a run (anything with `is_open`) as long as it is open."""
        if not any(ref() is run for ref in self._runs):
            self._runs = [ref for ref in self._runs if ref() is not None] + [weakref.ref(run)]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": [], "_returned": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotLayer:
        other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo), _runs=list(self._runs))
        return other

    def __copy__(self) -> SlotLayer:
        """Copy the store too: two layers on one store would overwrite each other's tokens."""
        return copy.deepcopy(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return what attention reads.

        If all heads hold equally many tokens, these are all stored keys and values. Otherwise they are the new ones,
        and the attention call reads the store.
        """
        if not self.attached and not self.is_whole:
            raise UnsupportedModel(
                f"past_key_values was compressed by a method that is no longer applied, and {self._state}; use it "
                f"inside foveate.apply(model), or start a new cache"
            )
        if self.shift is not None and not self.is_followed:
            raise UnsupportedModel(
                f"in past_key_values {self._state}; use it inside foveate.apply(model, ...) with a method that drops "
                f"tokens between layers, or start a new cache"
            )
        self.is_followed = False
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        kept, self._kept = self._kept, None
        if kept is None:
            self.store.append(key_states, value_states, self.seen)
            self.seen += key_states.shape[2]
        else:
            self.store.place(key_states, value_states, kept.positions, kept.empty)
            self.seen += kept.tokens
            self._dropped_at = self.seen
        LATEST.layer = self
        even = self.store.is_even
        out = (self.store.padded("k"), self.store.padded("v")) if even else (key_states, value_states)
        self._returned = weakref.ref(out[0]), weakref.ref(out[1])
        return out

    def expect(self, kept: Kept) -> None:
        """Expect the next update to bring what is left of a call's tokens."""
        self._kept = kept

    def handed_over(self, k: Tensor, v: Tensor) -> bool:
        """Return whether these are the tensors that `update` returned, unchanged by the model."""
        if self._returned is None:
            return True
        pairs = zip((k, v), self._returned, strict=True)
        return all((other := ref()) is not None and _same(x, other) for x, ref in pairs)

    @property
    def _state(self) -> str:
        coded = self.store is not None and self.store.codes is not None
        if coded:
            return "holds tokens encoded"
        if self.shift is not None:
            return "its tokens took other positions when some were dropped"
        return "its heads hold different numbers of tokens, or tokens with weights"

    @property
    def is_whole(self) -> bool:
        return self.store is None or self.store.is_whole(self.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.store, self.seen, self.is_initialized, self._dropped_at = None, 0, False, 0
        self.prompt, self.shift, self._kept = None, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            batch = self.store.groups[0].slots.k.shape[0]
            self.batch_select_indices(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store = self.store.batch(indices.to(self.device))
        if self.shift is not None:
            self.shift = self.shift[indices.to(self.shift.device)]

    def activate_past_recording(self) -> None:
        """Record that assisted decoding will remove tokens with `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens if that is negative, else keep the first `tokens_to_remove`."""
        end = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        if end >= self.seen:
            return
        if end < self._dropped_at or end < 0:
            raise UnsupportedModel(
                f"a compressed cache cannot be cropped to {end} tokens: at {self._dropped_at} tokens a method dropped "
                f'some; with evict="after prompt" it drops none later'
            )
        if self.store is not None:
            self.store.drop_after(end)
        self.seen = end

    @property
    def nbytes(self) -> int:
        return 0 if self.store is None else self.store.nbytes

    @property
    def keys(self) -> Tensor | None:
        """The stored keys in the order of the sequence, for code that reads a layer.

        If heads hold different numbers of tokens, they are padded with zeros instead.
        """
        return self._shown("k")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        _only_none(value)  # the base class sets it to None first

    @property
    def values(self) -> Tensor | None:
        return self._shown("v")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        _only_none(value)

    def _shown(self, what: str) -> Tensor | None:
        if self.store is None:
            return None
        if self.is_whole or not self.store.is_even:
            return self.store.padded(what)
        return getattr(self.store.groups[0].ordered(), what)

    def released(self) -> CacheLayerMixin:
        """Return the layer that replaces this one after its last run.

        It is an ordinary layer if no more tokens were dropped than a sliding layer drops. It is a `CompressedLayer`,
        which works without Foveate, if all heads hold equally many tokens and no sequence is padded. Otherwise it is
        this layer.
        """
        if self.shift is not None:
            return self
        reach = self.seen if self.window is None else min(self.seen, self.window - 1)
        if self.store is None or self.store.holds(reach):
            return self._ordinary()
        group = self.store.groups[0]
        if self.window is None and self.store.holds(group.length - group.holes[0]) and not self.padded:
            return CompressedLayer.of(group.ordered(), self.seen, self._dropped_at)
        return self

    def _ordinary(self) -> CacheLayerMixin:
        sliding = self.window is not None
        layer: DynamicLayer = DynamicSlidingWindowLayer(self.window) if sliding else DynamicLayer()
        if self.store is not None:
            group = self.store.groups[0]
            slots = group.slots if self.is_whole else group.ordered()
            layer.update(slots.k, slots.v)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = self.seen
        return layer


def tokens_seen(layer: object) -> int:
    """Return the number of tokens that a cache layer has seen; 0 for a layer without tokens."""
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


def _only_none(value: Tensor | None) -> None:
    if value is not None:
        raise UnsupportedModel(
            "a cache layer cannot be given other keys or values inside foveate.apply(model, ...), where it stores its "
            "tokens in slots; do that before or after the block"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same memory: one is the other, or a view of all of it."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
