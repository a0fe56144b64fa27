"""A compressed cache layer that transformers uses without Foveate after a run."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from foveate.core.errors import UnsupportedModel
from foveate.host.slots.slots import Slots


class CompressedLayer(DynamicLayer):
    """A layer that a method compressed. The model uses it as an ordinary layer, without Foveate.

    It holds fewer tokens than it has seen. New tokens get the position after the last one seen, and see all tokens that
    it holds. It can be copied, saved and loaded, and cropped to the length at which it was compressed.

    Attributes:
        seen: tokens of the sequence so far.
        positions: the position of each stored token in the sequence, `(B, Hkv, S)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.compressed_at = 0, 0
        self.positions_at_compression: Tensor = torch.empty(0, dtype=torch.int32)

    @classmethod
    def of(cls, slots: Slots, seen: int, compressed_at: int) -> CompressedLayer:
        """Make a layer of slots in the order of their positions, after `seen` tokens.

        No token was dropped after `compressed_at` tokens.
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
