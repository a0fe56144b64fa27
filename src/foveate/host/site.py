"""A site: one attention call of a pretrained model, as methods get it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
from foveate.host.hf.kept_mask import KeptMask
from foveate.host.hf.mask import MaskPlan, at_positions, is_given, masked_part
from foveate.host.own_sequence import OwnSequence, crossing
from foveate.host.spans import Place

if TYPE_CHECKING:
    from foveate.core.selection import Selection
    from foveate.host.hf.cache import SlotLayer
    from foveate.host.slots.store import Store


@dataclass(frozen=True, eq=False)
class Drops:
    """The choice of methods after a token.

    Args:
        gone: True at the positions of the tokens that each head dropped and still stores; None for no token.
        at_end: methods that choose when the whole pass has ended.
    """

    gone: Bool[Tensor, "b hkv n"] | None = None
    at_end: tuple[Any, ...] = ()


@dataclass(eq=False)
class Site:
    """One call of one attention module.

    `q (B, Hq, Nq, D)`, `k (B, Hkv, S, D)` and `v (B, Hkv, S, Dv)` are taken after the rotary embedding and after the
    cache update. `S` counts the stored keys: all so far, or, for a layer that was evicted from, its slots, padded to
    the longest head. A model may cache less than it attends to and expand it at each call (`expanded`; a shared latent,
    for instance): `k` and `v` are then the expanded ones, and `positions` has the heads of the cache. `k`, `v` and
    `positions` are views of the cache, which later tokens overwrite: clone what you keep of them.

    `order` counts the layers that attend, `layer` those of the cache. `sinks` are learnt logits without a key,
    `(1 or B, Hq, 1 or Nq, 1)`, which only enter the softmax; `position_bias` is added to the logits. `prompt` is the
    length of the prompt, once decoding has begun; `reads_prompt` is true before that. The call's last `tentative`
    tokens, or some of them, will be removed again (`drafts`: by assisted decoding). Its queries do not see the
    `hidden_keys`. After a call with drafts, `drops` is what methods chose after its last token that stays.
    `wants_weights` is true if the caller asked for weights (`output_attentions`).
    `ids` are the tokens of its queries; None if they are unknown. `spans` are named spans of the tokens so far, bool
    `(B, N)` beside their positions in the sequence. `is_branch` is true in a second reading; see `foveate.host.Branch`.

    In a call that attends to another sequence (cross attention), `own` describes the sequence of the queries: `seen`,
    `positions` and `real` are those of the keys, `asked` and `query_positions` those of the queries. In a diffusion
    model, `context (B, S, C)` has the hidden states that the keys come from, `spans` are spans of its tokens, and
    `project(other)` gives keys and values `(B', Hkv, S', D)` of another context by the layer's own projections.

    After attention, `weights` is set if they were computed, `selections` are those that were attended to, and
    `replaced` is true if a method replaced attention; it may set `read_share`, the share of keys that it read.
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
    sinks: Float[Tensor, "#b hq #nq 1"] | None = None
    position_bias: Float[Tensor, "... s"] | None = None
    slots: SlotLayer | None = None
    cache: Any = None
    hidden: Tensor | None = None
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    step: dict[Any, Any] = field(default_factory=dict)
    all_notes: dict[Any, dict[str, Any]] = field(default_factory=dict)
    weights: Tensor | None = None
    selections: list[Selection] = field(default_factory=list)
    replaced: bool = False
    read_share: float = 1.0
    expanded: bool = False
    prompt: int | None = None
    reads_prompt: bool = True
    tentative: int = 0
    drafts: bool = False
    hidden_keys: Bool[Tensor, "b hkv s"] | None = None
    drops: Drops | None = None
    wants_weights: bool = False
    ids: Int[Tensor, "b nq"] | None = None
    own: OwnSequence | None = None
    is_branch: bool = False
    context: Float[Tensor, "b s c"] | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def crosses(self) -> bool:
        """Return whether the keys are another sequence's."""
        return self.own is not None

    @cached_property
    def phase(self) -> Literal["prefill", "decode"]:
        """The phase of the call: "decode" if it generates a token, "prefill" if it reads text.

        A call without a past is "prefill". A single query with a past is "decode". Several queries with a past are
        "decode" if all but the first are drafts of assisted decoding, or if they are few (up to 16) and come after the
        sequence's first decoding call. So the pieces of a prompt are "prefill", and so is a long later turn.
        """
        n = self.tokens
        if self.asked <= n:
            return "prefill"
        if n == 1 or (self.drafts and self.tentative >= n - 1):
            return "decode"
        return "decode" if self.prompt is not None and n <= fused.FEW else "prefill"

    @property
    def tokens(self) -> int:
        """Tokens that the call reads, also those that were dropped before this layer; see `Method.drop`."""
        plan = self.attention_mask
        return plan.tokens if isinstance(plan, KeptMask) else self.q.shape[2]

    @cached_property
    def seen(self) -> int:
        """Tokens of the sequence so far, this call's included."""
        if self.slots is not None:
            return self.slots.seen
        if self.cache is not None and len(self.cache.layers) > self.layer:
            counted = tokens_seen(self.cache.layers[self.layer])
            if counted:  # it is zero if a layer reads another layer's keys
                return counted
        if isinstance(self.attention_mask, MaskPlan):
            return self.attention_mask.first_key + self.attention_mask.n_keys
        return self.new_k.shape[2]

    @property
    def asked(self) -> int:
        """Tokens of the queries' sequence so far, this call's included."""
        return self.seen if self.own is None else self.own.past + self.q.shape[2]

    @property
    def place(self) -> Place:
        """The tokens so far, as spans name them."""
        plan = self.attention_mask
        if isinstance(plan, KeptMask) and self.slots is None:
            return Place(self.q.shape[0], 0, plan.tokens, self.q.device, plan.kept)
        return Place(self.q.shape[0], 0, self.asked, self.q.device)

    @property
    def groups(self) -> int:
        """Number of query heads for each key/value head of attention."""
        return self.q.shape[1] // self.new_k.shape[1]

    @property
    def is_whole(self) -> bool:
        """Return whether the cache still holds every key that the model's own cache would hold."""
        return self.slots is None or self.slots.is_whole

    @property
    def _stored(self) -> Store:
        """The slots of a layer that was evicted from."""
        assert self.slots is not None and self.slots.store is not None  # else the cache is whole
        return self.slots.store

    @cached_property
    def k(self) -> Float[Tensor, "b hkv s d"]:
        handed = self.is_whole or self.expanded
        return self.new_k if handed else self._stored.padded("k")

    @cached_property
    def v(self) -> Float[Tensor, "b hkv s dv"]:
        handed = self.is_whole or self.expanded
        return self.new_v if handed else self._stored.padded("v")

    @cached_property
    def positions(self) -> Int[Tensor, "b hkv s"]:
        """Each slot's position in the sequence, padding included; see `foveate.host.Slots`."""
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
        plan = self.attention_mask
        if isinstance(plan, KeptMask) and self.slots is not None:
            if self.q.shape[0] > 1:
                raise UnsupportedModel(
                    "sequences of a batch keep different tokens, so that their queries have different positions; use "
                    "batches of one"
                )
            return plan.query_positions()[0]
        return torch.arange(self.asked - self.q.shape[2], self.asked, device=self.q.device)

    @cached_property
    def real(self) -> Bool[Tensor, "b n"] | None:
        """A mask of the tokens so far that are no padding; None if none is padding, or if it is unknown."""
        return self.attention_mask.real_tokens() if isinstance(self.attention_mask, MaskPlan) else None

    @property
    def real_queries(self) -> Bool[Tensor, "b nq"] | None:
        """A mask of the queries that are no padding; None if none is, or if it is unknown."""
        plan = self.attention_mask if self.own is None else self.own.mask
        if not isinstance(plan, MaskPlan):
            return None
        return plan.real_queries(self.q.shape[2])

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask `(B, 1 or Hq, Nq, S)`: bool, or a float bias of caller or model; None if all keys are seen."""
        visible = None
        if self.hidden_keys is not None:
            visible = ~self.hidden_keys.repeat_interleave(self._heads_a_row, 1)[:, :, None]
        return masks.combine(self._mask(), self._position_bias(), visible)

    def _position_bias(self) -> Tensor | None:
        """Return the model's bias by position at the stored keys."""
        bias = self.position_bias
        if bias is None:
            return None
        if self.is_whole:
            return bias[..., -self.k.shape[2] :]
        if bias.shape[-1] != self.seen:
            raise UnsupportedModel(
                f"{type(self.module).__name__} gives a bias for {bias.shape[-1]} keys of {self.seen}, which does not "
                f"cover the slots that a policy kept"
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
            if bias is None and plan.sees_all() and not self._stored.has_empty:
                return None
            return masks.combine(plan.at(self.positions).repeat_interleave(self._heads_a_row, 1), bias)
        whole = plan if plan is not None else self._causal()
        if whole is None:
            whole = torch.ones(1, 1, self.q.shape[2], self.seen, dtype=torch.bool, device=self.q.device)
        positions = self.positions.repeat_interleave(self._heads_a_row, 1)
        return masks.combine(at_positions(whole, positions, self.seen - whole.shape[3]), bias)

    def _causal(self) -> Bool[Tensor, "1 1 q k"] | None:
        """Return the causal mask that a call without a mask implies."""
        n = self.q.shape[2]
        keys = self.k.shape[2] if self.is_whole else self.seen
        return masks.causal(n, keys, device=self.q.device)[None, None] if self.is_causal and n > 1 else None

    @property
    def is_biased(self) -> bool:
        """Return whether learnt sinks or a bias by position enter the softmax beside scores and a mask."""
        return self.sinks is not None or self.position_bias is not None

    @cached_property
    def is_plain_causal(self) -> bool:
        """Return whether each query sees exactly the real keys up to its own.

        False for a window, a soft cap, and a mask of the caller's own.
        """
        plan = self.attention_mask
        if self.softcap is not None or self.is_biased or is_given(plan):
            return False
        if not self.is_whole or self.k.shape[2] != self.seen or self.hidden_keys is not None:
            return False
        return plan is None or (isinstance(plan, MaskPlan) and plan.is_plain_causal())

    @cached_property
    def key_mask(self) -> Bool[Tensor, "b 1 1 s"] | None:
        """A mask of the keys that are no padding, for a site that `is_plain_causal`; None if none is padding."""
        plan = self.attention_mask
        return plan.keys() if isinstance(plan, MaskPlan) else None

    def _bias(self) -> Tensor | None:
        """Return the log of the weight of each slot; None if all weights are 1."""
        if self.is_whole or not self._stored.is_weighted:
            return None
        bias = self._stored.padded("bias")
        return bias.to(self.q.dtype).repeat_interleave(self._heads_a_row, 1)[:, :, None]

    @property
    def _heads_a_row(self) -> int:
        """Number of query heads for each head of the cache."""
        return self.q.shape[1] // self.positions.shape[1]

    def as_of(self, seen: int) -> Site:
        """Return the same call, as if the sequence had ended after `seen` tokens. Its queries keep their positions."""
        other = copy.copy(self)
        other.__dict__["query_positions"] = self.query_positions
        other.__dict__["seen"] = seen
        return other

    def released(self) -> Site:
        """Return the call without its tensors, which read as NaN: for the time until its pass ends."""
        other = self.as_of(self.seen)
        for name in _CACHED:
            if name not in ("seen", "query_positions", "positions", "real", "begins"):
                other.__dict__.pop(name, None)
        other.__dict__["positions"] = self.positions.clone()  # slots may move before they are read
        for name in ("q", "new_k", "new_v", "hidden"):
            value = getattr(self, name)
            if value is not None:
                setattr(other, name, value.new_full((), torch.nan).expand(value.shape))
        other.weights, other.selections = None, []
        return other

    def refreshed(self) -> Site:
        """Return the same call with the slots as they are now: what was dropped since is no longer among them."""
        other = copy.copy(self)
        for name in ("k", "v", "positions", "mask"):
            other.__dict__.pop(name, None)
        return other

    def part(self, start: int, stop: int) -> Site:
        """Return some of the call's queries, with the keys up to the last of them, as a separate call."""
        later = self.q.shape[2] - stop
        end = None if not later else -later
        other = copy.copy(self)
        for name in _CACHED:
            other.__dict__.pop(name, None)
        other.q = self.q[:, :, start:stop]
        other.new_k, other.new_v = self.new_k[:, :, :end], self.new_v[:, :, :end]
        other.hidden = None if self.hidden is None else self.hidden[:, start:stop]
        other.ids = None if self.ids is None else self.ids[:, start:stop]
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
        other.step = self.step.setdefault(("part", start), {}) if start else self.step
        other.weights, other.selections = None, []
        return other

    def cut(self, surplus: int) -> None:
        """Remove the last keys, which no token has filled yet: the free room of a static cache."""
        self.new_k, self.new_v = self.new_k[:, :, :-surplus], self.new_v[:, :, :-surplus]
        if isinstance(self.attention_mask, MaskPlan):
            self.attention_mask = masked_part(self.attention_mask, 0, self.q.shape[2], surplus)
        if self.position_bias is not None:
            self.position_bias = self.position_bias[..., :-surplus]

    def notes(self, method: object, *, all_layers: bool = False) -> dict[str, Any]:
        """Return the notes of a method for this layer (or for all layers together) and this sequence.

        A method stores in this dictionary what it needs in later calls. Its tensors follow beam search's reordering. It
        is empty at the start of every sequence. Calls of one layer to its own sequence and to another have notes each.
        """
        layer = None if all_layers else self.layer
        return self.all_notes.setdefault((id(method), crossing(layer) if self.crosses else layer), {})


#: Names of the values that a site computes once.
_CACHED = tuple(name for name, value in vars(Site).items() if isinstance(value, cached_property))
