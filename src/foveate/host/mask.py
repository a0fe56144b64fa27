"""A mask described, not built: what transformers would mask, asked for at the positions that a layer really holds.

The framework makes one mask for all layers of a kind before any of them runs. Layers that keep different tokens, per
head, each need their own; so ours hands down the description, and every site reads from it what it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from foveate.host.slots import SUMMARY


class MaskPlan:
    """The arguments of transformers' mask functions, kept until somebody asks.

    `native(implementation)` is what that implementation's mask function gives (None where the kernel needs no mask);
    `dense()` is the bool mask `(B, 1, Nq, kv_length)` over keys `kv_offset ...`; `at(positions)` is that for any slots.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.first_key = int(arguments.get("kv_offset", 0))
        self.n_keys = int(arguments["kv_length"])
        self._native: dict[str, Any] = {}
        self._dense: Tensor | None = None

    def native(self, implementation: str) -> Any:
        if implementation not in self._native:
            self._native[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
        return self._native[implementation]

    def sees_all(self) -> bool:
        """Whether a single query sees every key there is."""
        return self.arguments["q_length"] == 1 and self.native("sdpa") is None

    def dense(self) -> Bool[Tensor, "b 1 q k"]:
        if self._dense is None:
            arguments = {**self.arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            self._dense = sdpa_mask(**arguments)
        assert self._dense is not None
        return self._dense

    def at(self, positions: Int[Tensor, "b h s"]) -> Bool[Tensor, "b h q s"]:
        """Which slots each query may see: an empty one none, a summary all."""
        dense = self.dense()
        index = positions - self.first_key
        real = (index >= 0) & (index < self.n_keys)
        batch, heads, n = index.shape
        wide = dense.expand(batch, -1, -1, -1)
        wide = wide.expand(-1, heads, -1, -1) if wide.shape[1] == 1 else wide
        picked = wide.gather(3, index.clamp(0, self.n_keys - 1)[:, :, None].expand(batch, heads, wide.shape[2], n))
        return (picked & real[:, :, None]) | (positions == SUMMARY)[:, :, None]


def describe(**arguments: Any) -> MaskPlan:
    """The mask function that Foveate registers with transformers."""
    return MaskPlan(**arguments)
