"""A site: one attention call of a pretrained model, as methods see it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks
from foveate.core.engines import fused
from foveate.core.errors import UnsupportedModel
from foveate.host.hf.cache import tokens_seen
from foveate.host.hf.mask import MaskPlan, at_positions, is_given, masked_part

if TYPE_CHECKING:
    from foveate.core.selection import Selection
    from foveate.host.hf.cache import SlotLayer


@dataclass(eq=False)
class Site:
    """One call of one attention module.

    `q (B, Hq, Nq, D)`, `k (B, Hkv, S, D)`, `v (B, Hkv, S, Dv)` come after rotary embedding and after the cache update;
    `S` are the keys at hand: all so far, or, for a layer that was evicted from, its slots padded to the longest head.
    A model may cache less than it attends to and expand it at each call (`expanded`; a shared latent, for instance):
    `k` and `v` are then the expanded ones, and `positions` has the heads of the cache. `k`, `v` and `positions` are
    views of the cache, which the next tokens write over: clone what you keep of them. `order` counts the layers that
    attend, `layer` those of the cache. `sinks` are learnt logits of nothing, `(1 or B, Hq, 1 or Nq, 1)`, which take
    part in the softmax alone; `position_bias` is added to the logits. `prompt` is the length of the prompt, once the
    sequence has left it; `reads_prompt` says whether it is still there. The call's last `tentative` tokens will be
    taken back, all or some of them (`drafts`, of assisted decoding); `hidden_keys` are some that its queries do not
    see. `wants_weights` says that the caller asked for them (`output_attentions`). For readers, once attention is done:
    `weights` where somebody made them, the `selections` that were attended
    to, and whether a method put something else in attention's place (`replaced`).
    """

    module: nn.Module
    layer: int
    q: Float[Tensor, "b hq nq d"]
    new_k: Float[Tensor, "b hkv n d"]
    new_v: Float[Tensor, "b hkv n dv"]
    scale: float
    attention_mask: MaskPlan | Tensor | None
    is_causal: bool
    order: int = 0
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Float[Tensor, "b hq nq 1"] | None = None
    position_bias: Float[Tensor, "... n"] | None = None
    slots: SlotLayer | None = None
    cache: Any = None
    hidden: Tensor | None = None
    spans: dict[str, Tensor] = field(default_factory=dict)
    step: dict[Any, Any] = field(default_factory=dict)
    memories: dict[Any, dict[str, Any]] = field(default_factory=dict)
    weights: Tensor | None = None
    selections: list[Selection] = field(default_factory=list)
    replaced: bool = False
    expanded: bool = False
    prompt: int | None = None
    reads_prompt: bool = True
    tentative: int = 0
    drafts: bool = False
    hidden_keys: Bool[Tensor, "b hkv s"] | None = None
    wants_weights: bool = False

    @cached_property
    def phase(self) -> Literal["prefill", "decode"]:
        """ "decode" where tokens are made, "prefill" where they are read.

        A call without a past is "prefill", and one of a single query with a past is "decode". Several queries with a
        past are "decode" where all but the first are drafts of assisted decoding, and where they are few (up to 16)
        after the sequence's first decoding call. So the pieces of a prompt are "prefill", and so is a long further
        turn.
        """
        n = self.q.shape[2]
        if self.seen <= n:
            return "prefill"
        if n == 1 or (self.drafts and self.tentative >= n - 1):
            return "decode"
        return "decode" if self.prompt is not None and n <= fused.FEW else "prefill"

    @cached_property
    def seen(self) -> int:
        """Tokens of the sequence so far, this call's included."""
        if self.slots is not None:
            return self.slots.seen
        if self.cache is not None and len(self.cache.layers) > self.layer:
            counted = tokens_seen(self.cache.layers[self.layer])
            if counted:  # zero where a layer reads another's keys
                return counted
        if isinstance(self.attention_mask, MaskPlan):
            return self.attention_mask.first_key + self.attention_mask.n_keys
        return self.new_k.shape[2]

    @property
    def groups(self) -> int:
        """Query heads to each key/value head that attention sees."""
        return self.q.shape[1] // self.new_k.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether every key that the model would have is still there."""
        return self.slots is None or self.slots.is_whole

    @cached_property
    def k(self) -> Float[Tensor, "b hkv s d"]:
        handed = self.is_whole or self.expanded
        return self.new_k if handed else self.slots.store.padded("k")  # type: ignore[union-attr]

    @cached_property
    def v(self) -> Float[Tensor, "b hkv s dv"]:
        handed = self.is_whole or self.expanded
        return self.new_v if handed else self.slots.store.padded("v")  # type: ignore[union-attr]

    @cached_property
    def positions(self) -> Int[Tensor, "b hkv s"]:
        """Each slot's position in the sequence (padding counts); see `foveate.host.Slots` for `EMPTY` and `SUMMARY`."""
        if self.slots is not None and self.slots.store is not None:
            return self.slots.store.padded("positions")
        n = self.new_k.shape[2]
        first = self.attention_mask.first_key if isinstance(self.attention_mask, MaskPlan) else 0
        return torch.arange(first, first + n, device=self.q.device).expand(*self.new_k.shape[:2], n)

    @cached_property
    def begins(self) -> Int[Tensor, " b"]:
        """The start of each sequence: the position of its first token that is not padding."""
        plan = self.attention_mask
        if isinstance(plan, MaskPlan):
            return plan.begins(self.q.shape[0], self.q.device)
        return torch.zeros(self.q.shape[0], dtype=torch.long, device=self.q.device)

    @cached_property
    def query_positions(self) -> Int[Tensor, " nq"]:
        return torch.arange(self.seen - self.q.shape[2], self.seen, device=self.q.device)

    @cached_property
    def real(self) -> Bool[Tensor, "b n"] | None:
        """A mark for each token so far that is no padding; None where all are real, or where nobody says."""
        return self.attention_mask.real_tokens() if isinstance(self.attention_mask, MaskPlan) else None

    @property
    def real_queries(self) -> Bool[Tensor, "b nq"] | None:
        """A mark for each query that is no padding; None where all are real, or the keys are another sequence's."""
        if self.real is None or not isinstance(self.attention_mask, MaskPlan):
            return None
        first, n = int(self.attention_mask.arguments.get("q_offset", 0)), self.q.shape[2]
        real = self.real[:, first : first + n]
        return real if real.shape[1] == n else None

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask `(B, 1 or Hq, Nq, S)`: bool, or a float bias of the caller's or the model's own; None for
        everything.
        """
        shown = None
        if self.hidden_keys is not None:
            shown = ~self.hidden_keys.repeat_interleave(self._heads_a_row, 1)[:, :, None]
        return masks.combine(self._mask(), self._position_bias(), shown)

    def _position_bias(self) -> Tensor | None:
        """The model's bias by position, at the keys that are at hand."""
        bias = self.position_bias
        if bias is None:
            return None
        if self.is_whole:
            return bias[..., -self.k.shape[2] :]
        if bias.shape[-1] != self.seen:
            raise UnsupportedModel(
                f"{type(self.module).__name__} gives a bias for {bias.shape[-1]} keys of {self.seen}, which cannot be "
                f"read at the slots that a policy kept"
            )
        return at_positions(bias, self.positions.repeat_interleave(self._heads_a_row, 1), 0)

    def _mask(self) -> Tensor | None:
        plan = self.attention_mask
        if self.is_whole:
            if isinstance(plan, MaskPlan):
                return None if plan.sees_all() else plan.dense()
            return plan[..., : self.k.shape[2]] if plan is not None else self._causal()
        bias = self._bias()
        if isinstance(plan, MaskPlan):
            if bias is None and plan.sees_all() and not self.slots.store.has_empty:  # type: ignore[union-attr]
                return None
            return masks.combine(plan.at(self.positions).repeat_interleave(self._heads_a_row, 1), bias)
        whole = plan if plan is not None else self._causal()
        if whole is None:
            whole = torch.ones(1, 1, self.q.shape[2], self.seen, dtype=torch.bool, device=self.q.device)
        positions = self.positions.repeat_interleave(self._heads_a_row, 1)
        return masks.combine(at_positions(whole, positions, self.seen - whole.shape[3]), bias)

    def _causal(self) -> Bool[Tensor, "1 1 q k"] | None:
        """The mask that a call without one means."""
        n = self.q.shape[2]
        keys = self.k.shape[2] if self.is_whole else self.seen
        return masks.causal(n, keys, device=self.q.device)[None, None] if self.is_causal and n > 1 else None

    @property
    def is_biased(self) -> bool:
        """Whether the softmax has more in it than scores and a mask: learnt sinks, or a bias by position."""
        return self.sinks is not None or self.position_bias is not None

    @cached_property
    def is_plain_causal(self) -> bool:
        """Whether each query sees exactly the real keys up to its own: no window, no soft cap, no mask of the
        caller's.
        """
        plan = self.attention_mask
        if self.softcap is not None or self.is_biased or is_given(plan):
            return False
        if not self.is_whole or self.k.shape[2] != self.seen or self.hidden_keys is not None:
            return False
        return plan is None or (isinstance(plan, MaskPlan) and plan.is_plain_causal())

    @cached_property
    def key_mask(self) -> Bool[Tensor, "b 1 1 s"] | None:
        """A mark for each key that is no padding, for a site that `is_plain_causal`; None where all are real."""
        plan = self.attention_mask
        return plan.keys() if isinstance(plan, MaskPlan) else None

    def _bias(self) -> Tensor | None:
        """The log of how many tokens a slot stands for, where any stands for several."""
        if self.is_whole or not self.slots.store.has_summary:  # type: ignore[union-attr]
            return None
        bias = self.slots.store.padded("bias")  # type: ignore[union-attr]
        return bias.to(self.q.dtype).repeat_interleave(self._heads_a_row, 1)[:, :, None]

    @property
    def _heads_a_row(self) -> int:
        """Query heads to each head of the cache."""
        return self.q.shape[1] // self.positions.shape[1]

    def as_of(self, seen: int) -> Site:
        """The same call, as if the sequence had ended after `seen` tokens."""
        other = copy.copy(self)
        other.__dict__.pop("query_positions", None)
        other.__dict__["seen"] = seen
        return other

    def part(self, start: int, stop: int) -> Site:
        """Some of the call's queries, with the keys up to the last of them, as a call of its own."""
        later = self.q.shape[2] - stop
        end = None if not later else -later
        other = copy.copy(self)
        for name in _CACHED:
            other.__dict__.pop(name, None)
        other.q = self.q[:, :, start:stop]
        other.new_k, other.new_v = self.new_k[:, :, :end], self.new_v[:, :, :end]
        other.hidden = None if self.hidden is None else self.hidden[:, start:stop]
        other.attention_mask = masked_part(self.attention_mask, start, stop, later)
        if self.sinks is not None and self.sinks.shape[2] > 1:
            other.sinks = self.sinks[:, :, start:stop]
        if self.position_bias is not None:
            rows = slice(start, stop) if self.position_bias.shape[-2] > 1 else slice(None)
            other.position_bias = self.position_bias[..., rows, :end]
        if self.is_whole or self.expanded:
            other.__dict__["positions"] = self.positions[:, :, :end]
        other.tentative = max(0, self.tentative - later)
        other.__dict__["seen"] = self.seen - later
        other.step = self.step.setdefault(("part", start), {})
        other.weights, other.selections = None, []
        return other

    def cut(self, surplus: int) -> None:
        """Leave out the last keys, which no token has filled yet: the room of a static cache."""
        self.new_k, self.new_v = self.new_k[:, :, :-surplus], self.new_v[:, :, :-surplus]
        if isinstance(self.attention_mask, MaskPlan):
            self.attention_mask = masked_part(self.attention_mask, 0, self.q.shape[2], surplus)
        if self.position_bias is not None:
            self.position_bias = self.position_bias[..., :-surplus]

    def memory(self, method: object, *, all_layers: bool = False) -> dict[str, Any]:
        """The memory of a method for this layer (or all layers together) and this sequence.

        Tensors in it follow beam search's reordering. It begins empty with every new sequence.
        """
        return self.memories.setdefault((id(method), None if all_layers else self.layer), {})


#: What a site works out once.
_CACHED = tuple(name for name, value in vars(Site).items() if isinstance(value, cached_property))
