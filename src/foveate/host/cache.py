"""A transformers cache layer that may forget: it counts what it has seen apart from what it stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.method import Method, overrides
from foveate.host.slots import Store

if TYPE_CHECKING:
    from foveate.host.site import Site


class SlotLayer(CacheLayerMixin):
    """Stands in for a `DynamicLayer` while a method evicts.

    Positions stay right, since `get_seq_length` is what was seen. Masks are asked for the whole span `0..seen` and read
    at the stored positions. Reordering, repeating and selecting in the batch work; cropping an evicted layer does not.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, native: DynamicLayer) -> None:
        super().__init__()
        self.native_type, self.is_sliding = type(native), bool(getattr(native, "is_sliding", False))
        self.window: int | None = getattr(native, "sliding_window", None)
        self.seen = native.get_seq_length()
        self.store: Store | None = None
        self.is_expected = False  # a run is open, and its attention call will follow
        if native.is_initialized and native.keys is not None and native.keys.numel():
            self.lazy_initialization(native.keys, native.values)
            assert self.store is not None
            self.store = self.store.append(native.keys, native.values, self.seen - native.keys.shape[2])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = Store.empty(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values where nothing was dropped yet, else the new ones (the site reads the
        store).
        """
        if not self.is_expected and not self.is_whole:
            raise UnsupportedModel(
                "past_key_values was compressed by a method that is no longer applied; start a new cache"
            )
        self.is_expected = False
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        self.store = self.store.append(key_states, value_states, self.seen)
        self.seen += key_states.shape[2]
        if self.is_whole:
            return self.store.padded("k"), self.store.padded("v")
        return key_states, value_states

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
        self.store, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            batch = self.store.groups[0].slots.k.shape[0]
            self.batch_select_indices(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store = self.store.batch(indices.to(self.device))

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedModel(
            f"a cache that a method evicts from cannot be cropped (tokens_to_remove={tokens_to_remove})"
        )

    def released(self) -> CacheLayerMixin:
        """For life after the run: an ordinary layer where no more is gone than a sliding layer forgets, else this
        one.
        """
        self.is_expected = False
        window = self.seen if self.window is None else min(self.seen, self.window - 1)
        if not (self.is_whole or (self.store is not None and self.store.is_whole(window))):
            return self
        layer = self.native_type(sliding_window=self.window) if self.window is not None else self.native_type()
        if self.store is not None:
            layer.update(self.store.padded("k"), self.store.padded("v"))
        if self.window is not None:
            layer.cumulative_length = self.seen
        return layer


def evict(site: Site, methods: list[Method]) -> None:
    """After the call: drop what some method drops, and what has left a sliding layer's window."""
    layer = site.slots
    assert layer is not None and layer.store is not None
    keeping = [(m, kept) for m in methods if overrides(m, "keep") and m.at(site) and (kept := m.keep(site)) is not None]
    keep = torch.ones_like(site.positions, dtype=torch.bool) if keeping or layer.window is not None else None
    if keep is None:
        return
    if layer.window is not None:
        keep = keep & (site.positions > layer.seen - layer.window)
    for method, kept in keeping:
        if kept.shape != site.positions.shape:
            raise OptionError(
                f"keep() of {type(method).__name__} must be {tuple(site.positions.shape)}; got {tuple(kept.shape)}"
            )
        keep = keep & kept
    folding = [m for m, _ in keeping if overrides(m, "fold")]
    fold = (lambda dropped, summary: folding[-1].fold(site, dropped, summary)) if folding else None
    layer.store = layer.store.evict(keep, fold)
