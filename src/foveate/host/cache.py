"""Transformers cache layers that may forget: they count what they have seen apart from what they store."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.ends import Ends, shown
from foveate.host.method import Method, overrides
from foveate.host.slots import Fold, Slots, Store

if TYPE_CHECKING:
    from foveate.host.site import Site

#: Per thread, the layer that was updated last: the attention call that follows is its own.
LATEST = threading.local()


class SlotLayer(CacheLayerMixin):
    """A layer of slots that stands in for a `DynamicLayer` while a method evicts.

    Positions stay right, since `get_seq_length` is the number of tokens seen. Masks are asked for the whole span
    `0..seen` and read at the stored positions. Reordering, repeating and selecting in the batch work. Cropping works
    back to any length since which nothing was dropped.

    Attributes:
        seen: tokens of the sequence so far.
        store: the slots; None before the first token.
        window: tokens that a sliding layer sees; None for a full one.
        attached: whether a run is open on this cache, or on the one that it was copied from.
        padded: whether some sequence had padding.
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
        self._dropped_at = 0  # tokens seen when something was dropped last
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
        """Serve a run (anything with `is_open`) as long as it is open."""
        if not any(ref() is run for ref in self._runs):
            self._runs = [ref for ref in self._runs if ref() is not None] + [weakref.ref(run)]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": [], "_returned": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotLayer:
        other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo), _runs=list(self._runs))
        return other

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append. Returns every stored key and value where all heads hold equally many, else the new ones, and the
        attention call reads the store.
        """
        if not self.attached and not self.is_whole:
            raise UnsupportedModel(
                "past_key_values was compressed by a method that is no longer applied, and its heads hold different "
                "numbers of tokens; go on inside foveate.apply(model), or start a new cache"
            )
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        self.store.append(key_states, value_states, self.seen)
        self.seen += key_states.shape[2]
        LATEST.layer = self
        even = self.store.is_even
        out = (self.store.padded("k"), self.store.padded("v")) if even else (key_states, value_states)
        self._returned = weakref.ref(out[0]), weakref.ref(out[1])
        return out

    def handed_over(self, k: Tensor, v: Tensor) -> bool:
        """Whether these are what `update` returned, and not something that the model made of it."""
        if self._returned is None:
            return True
        pairs = zip((k, v), self._returned, strict=True)
        return all((other := ref()) is not None and _same(x, other) for x, ref in pairs)

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            batch = self.store.groups[0].slots.k.shape[0]
            self.batch_select_indices(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store = self.store.batch(indices.to(self.device))

    def activate_past_recording(self) -> None:
        """Assisted decoding announces that it will take tokens back with `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, or go back to a length of `tokens_to_remove`."""
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
        """What is stored, for code that looks into a layer: in the order of the sequence, or, where heads hold
        different numbers, padded with zeros.
        """
        return self._shown("k")

    @keys.setter
    def keys(self, _: None) -> None:
        """The base class begins with none."""

    @property
    def values(self) -> Tensor | None:
        return self._shown("v")

    @values.setter
    def values(self, _: None) -> None:
        """The base class begins with none."""

    def _shown(self, what: str) -> Tensor | None:
        if self.store is None:
            return None
        if self.is_whole or not self.store.is_even:
            return self.store.padded(what)
        return getattr(self.store.groups[0].ordered(), what)

    def released(self) -> CacheLayerMixin:
        """The layer for life after the last run on it.

        An ordinary layer where no more is gone than a sliding layer forgets. A `CompressedLayer`, which goes on without
        Foveate, where all heads hold equally many tokens and no sequence is padded. Else this one.
        """
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
            slots = self.store.groups[0].ordered()
            layer.update(slots.k, slots.v)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = self.seen
        return layer


class CompressedLayer(DynamicLayer):
    """A layer that a method compressed, as an ordinary one: the model goes on with it without Foveate.

    It holds fewer tokens than it has seen. New tokens get the position after the last one seen, and see all that is
    held. It can be copied, saved and loaded, and cropped back to where it was compressed.

    Attributes:
        seen: tokens of the sequence so far.
        positions: where in the sequence each held token stood, `(B, Hkv, S)`, at the time of compression.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.compressed_at = 0, 0
        self.positions_at_compression: Tensor = torch.empty(0, dtype=torch.int32)

    @classmethod
    def of(cls, slots: Slots, seen: int, compressed_at: int) -> CompressedLayer:
        """What is held, in the order of its positions, after `seen` tokens, of which none was dropped since
        `compressed_at`.
        """
        layer = cls()
        layer.lazy_initialization(slots.k, slots.v)
        layer.keys, layer.values = slots.k, slots.v
        layer.positions_at_compression = slots.positions[..., : slots.positions.shape[2] - (seen - compressed_at)]
        layer.seen, layer.compressed_at = seen, compressed_at
        return layer

    @property
    def positions(self) -> Tensor:
        later = torch.arange(self.compressed_at, self.seen, device=self.device, dtype=torch.int32)
        held = self.positions_at_compression
        return torch.cat([held, later.expand(*held.shape[:2], -1)], 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = super().get_seq_length()
        return stored + query_length, self.seen - stored

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        end = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        if end < self.compressed_at:
            raise UnsupportedModel(
                f"this cache was compressed at {self.compressed_at} tokens and cannot be cropped to {end}"
            )
        if end < self.seen:
            super().crop(end - self.seen)
            self.seen = end

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.positions_at_compression = self.positions_at_compression.repeat_interleave(repeats, 0)

    def _choose(self, index: Tensor) -> None:
        self.positions_at_compression = self.positions_at_compression[index.to(self.positions_at_compression.device)]

    def reset(self) -> None:
        super().reset()
        self.seen = self.compressed_at = 0
        self.positions_at_compression = self.positions_at_compression[..., :0]


def tokens_seen(layer: object) -> int:
    """Tokens that a cache layer has seen; none where it keeps a state, or nothing."""
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


def evict(site: Site, methods: list[Method]) -> None:
    """After the call: drop what some method drops, and what has left a sliding layer's window.

    The call's tentative tokens, which will be taken back, stay and do not count.
    """
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
    keep = site.positions > settled - layer.window if shrinks else None  # type: ignore[operator]
    for method, kept in keeping:
        mask = shown(kept, site)
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
    """What several methods and a layer's window keep together, where it can be said in numbers."""
    kept = [what for _, what in keeping if isinstance(what, Ends)]
    if len(kept) < len(keeping):
        return None
    parts = [*kept, *([] if window is None else [Ends(0, window - 1)])]
    if len(parts) == 2 and window is not None and seen - window + 1 >= kept[0].sink:  # the sinks have left the window
        return None if kept[0].full else Ends(0, min(kept[0].recent, window - 1))
    return parts[0] if len(parts) == 1 else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors show the same numbers: one is the other, or a view of all of it."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
