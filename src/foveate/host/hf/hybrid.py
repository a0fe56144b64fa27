"""Cache layers with slots and a state: for layers that combine attention with a convolution or linear attention."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.compressed import CompressedLayer

#: The layers of transformers that have both.
Hybrid: TypeAlias = LinearAttentionAndFullAttentionLayer | LinearAttentionAndSlidingWindowAttentionLayer

#: Names of the attributes that make up such a layer's state.
STATE = (
    "number_of_states", "conv_states", "recurrent_states", "is_conv_states_initialized",
    "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size",
)  # fmt: skip


class HybridSlotLayer(SlotLayer, LinearAttentionLayer):
    """A layer of slots that also keeps a state, which no method changes."""

    dtype: Any = None
    device: Any = None

    def __init__(self, native: Hybrid) -> None:
        super().__init__(native)
        self._native = type(native)
        _hand_over(native, self)

    def lazy_initialization(self, *args: Tensor, **kwargs: object) -> None:
        if args:
            SlotLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        SlotLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        SlotLayer.reorder_cache(self, beam_idx)

    is_croppable = LinearAttentionLayer.is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SlotLayer.crop(self, tokens_to_remove)

    def activate_past_recording(self) -> None:
        SlotLayer.activate_past_recording(self)

    def released(self) -> CacheLayerMixin:
        """Return an ordinary layer if no more tokens were dropped than a sliding layer drops, else this one."""
        plain = super().released()
        if isinstance(plain, SlotLayer | CompressedLayer):  # a compressed layer has no place for the state
            return self
        given: dict[str, Any] = {} if self.window is None else {"sliding_window": self.window}
        layer = self._native(number_of_states=self.number_of_states, **given)
        for name, value in vars(plain).items():
            setattr(layer, name, value)
        _hand_over(self, layer)
        return layer


def _hand_over(one: LinearAttentionLayer, other: LinearAttentionLayer) -> None:
    """Give one layer's state to another."""
    for name in STATE:
        setattr(other, name, getattr(one, name))
