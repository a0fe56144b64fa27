"""What a method sees at one attention call of a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks
from foveate.host.mask import MaskPlan
from foveate.host.slots import EMPTY

if TYPE_CHECKING:
    from foveate.host.cache import SlotLayer
    from foveate.host.method import Method


@dataclass(eq=False)
class Site:
    """One call of one attention module.

    `q (B, Hq, Nq, D)`, `k (B, Hkv, S, D)`, `v (B, Hkv, S, Dv)` come after rotary embedding and after the cache update;
    `S` are the keys at hand: all so far, or, for a layer that was evicted from, its slots padded to the longest head.
    """

    module: nn.Module
    layer: int
    q: Float[Tensor, "b hq nq d"]
    new_k: Float[Tensor, "b hkv n d"]
    new_v: Float[Tensor, "b hkv n dv"]
    scale: float
    attention_mask: MaskPlan | Tensor | None
    is_causal: bool
    dropout: float = 0.0
    softcap: float | None = None
    slots: SlotLayer | None = None
    cache: Any = None
    hidden: Tensor | None = None
    spans: dict[str, Tensor] = field(default_factory=dict)
    step: dict[Any, Any] = field(default_factory=dict)
    memories: dict[Any, dict[str, Any]] = field(default_factory=dict)
    weights: Tensor | None = None

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        """"decode" for a single query that has a past, else "prefill"."""
        return "decode" if self.q.shape[2] == 1 and self.seen > 1 else "prefill"

    @cached_property
    def seen(self) -> int:
        """Tokens of the sequence so far, this call's included."""
        if self.slots is not None:
            return self.slots.seen
        if isinstance(self.attention_mask, MaskPlan):
            return self.attention_mask.first_key + self.attention_mask.n_keys
        return self.new_k.shape[2]

    @property
    def groups(self) -> int:
        """Query heads to each key/value head."""
        return self.q.shape[1] // self.new_k.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether every key that the model would have is still there."""
        return self.slots is None or self.slots.is_whole

    @cached_property
    def k(self) -> Float[Tensor, "b hkv s d"]:
        return self.new_k if self.is_whole else self.slots.store.padded("k")  # type: ignore[union-attr]

    @cached_property
    def v(self) -> Float[Tensor, "b hkv s dv"]:
        return self.new_v if self.is_whole else self.slots.store.padded("v")  # type: ignore[union-attr]

    @cached_property
    def positions(self) -> Int[Tensor, "b hkv s"]:
        """Each slot's position in the sequence (padding counts); see `foveate.host.slots` for `EMPTY` and `SUMMARY`."""
        if self.slots is not None and self.slots.store is not None:
            return self.slots.store.padded("positions")
        n = self.new_k.shape[2]
        first = self.attention_mask.first_key if isinstance(self.attention_mask, MaskPlan) else 0
        return torch.arange(first, first + n, device=self.q.device).expand(*self.new_k.shape[:2], n)

    @cached_property
    def query_positions(self) -> Int[Tensor, "nq"]:
        return torch.arange(self.seen - self.q.shape[2], self.seen, device=self.q.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """Who may see what, `(B, 1 or Hq, Nq, S)`: bool, or a float bias that the caller gave; None for everything."""
        plan = self.attention_mask
        if plan is None:
            n, s = self.q.shape[2], self.k.shape[2]
            return masks.causal(n, s, device=self.q.device)[None, None] if self.is_causal and n > 1 else None
        if isinstance(plan, Tensor):
            return plan[..., : self.k.shape[2]]
        if self.is_whole:
            return None if plan.sees_all() else plan.dense()
        bias = self._bias()
        if bias is None and plan.sees_all() and bool((self.positions != EMPTY).all()):
            return None
        return masks.combine(plan.at(self.positions).repeat_interleave(self.groups, 1), bias)

    def _bias(self) -> Tensor | None:
        """The log of how many tokens a slot stands for, where any stands for several."""
        if self.is_whole or not self.slots.store.has_summary:  # type: ignore[union-attr]
            return None
        count = self.slots.store.padded("count")  # type: ignore[union-attr]
        return count.log().to(self.q.dtype).repeat_interleave(self.groups, 1)[:, :, None]

    def memory(self, method: Method) -> dict[str, Any]:
        """What a method remembers of this layer and this sequence; tensors in it follow beam search's reordering."""
        return self.memories.setdefault((id(method), self.layer), {})
