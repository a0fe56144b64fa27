"""Dense attention among tokens that each have a frame of reference: a camera, a place in an image, a time.

The relation `F_i⁻¹ F_j` of two frames factors into one transform per token, so that no pair needs its own: queries,
keys and values are mapped into a common frame, attention runs there, and the outputs are mapped back into the queries'
frames.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor

from foveate.core import engines, masks
from foveate.core.call import AttentionCall, Plan, StateSizes
from foveate.core.engines import reference
from foveate.core.scoring import SOFTMAX, Scoring
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.streaming import Streaming
from foveate.ops.operator import Capabilities


class Frame(Protocol):
    """The frames of some tokens. Each method treats tokens one by one and is linear in them."""

    @property
    def marks(self) -> Tensor | None:
        """Further per-token numbers that the scoring needs, such as times: `(B or 1, H or 1, N)`, or None."""

    def query(self, q: Tensor) -> Tensor: ...
    def key(self, k: Tensor) -> Tensor: ...
    def value(self, v: Tensor) -> Tensor: ...
    def back(self, out: Tensor) -> Tensor:
        """Map outputs from the common frame to those of the tokens, the inverse of `value`."""


class FramedTokens(NamedTuple):
    """The tokens of a call: the keys' positions begin at `start`, and the queries are the last of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: int
    causal: bool

    @property
    def key_positions(self) -> Tensor:
        return torch.arange(self.start, self.start + self.k.shape[2], device=self.k.device)

    @property
    def query_positions(self) -> Tensor:
        end = self.start + self.k.shape[2]
        return torch.arange(end - self.q.shape[2], end, device=self.q.device)


@dataclass(frozen=True)
class FramedState:
    """Keys and values so far, already in the common frame, and their marks."""

    cache: KVState
    marks: Tensor | None


class Framed(Streaming):
    """Dense attention in frames. Subclasses define `frames`, from a call's inputs, and may override `scoring`.

    The base handles masking, causality, engines and streaming. Frames are absolute, so cached keys never change.
    """

    capabilities = Capabilities(has_weights=False)
    state_type: ClassVar[type] = FramedState

    @abstractmethod
    def frames(self, tokens: FramedTokens, inputs: Mapping[str, Tensor]) -> tuple[Frame, Frame]:
        """Return the frames of the queries, and those of the keys."""

    def scoring(self, marks: Tensor | None) -> Scoring:
        """Return the scoring of a call, from the marks of its keys; the fused kernels' softmax unless overridden."""
        return SOFTMAX

    def _framed(self, call: AttentionCall) -> tuple[AttentionCall, Frame, Frame]:
        """Return the call in the common frame, and the frames of its queries and keys."""
        q, k, v, mask = call.q, call.k, call.v, call.mask
        mine, theirs = self.frames(FramedTokens(q, k, v, 0, call.causal), call.inputs)
        k, v = theirs.key(masks.without_hidden(k, mask)), theirs.value(masks.without_hidden(v, mask))
        return replace(call, q=mine.query(q), k=k, v=v, scoring=self.scoring(theirs.marks)), mine, theirs

    @final
    def _attend(self, call: AttentionCall) -> Tensor:
        framed, mine, _ = self._framed(call)
        return mine.back(engines.run(framed, call.engine))

    @final
    def _weights(self, call: AttentionCall) -> Tensor:
        return reference.weights(self._framed(call)[0])

    @final
    def _plan(self, call: AttentionCall) -> Plan:
        return engines.plan(self._framed(call)[0], call.engine)

    @final
    def _init_state(self, sizes: StateSizes) -> FramedState:
        shapes = (sizes.heads, sizes.key_dim), (sizes.kv_heads, sizes.key_dim), (sizes.kv_heads, sizes.value_dim)
        q, k, v = (
            torch.empty(sizes.batch, count, 0, width, dtype=sizes.dtype, device=sizes.device) for count, width in shapes
        )
        _, theirs = self.frames(FramedTokens(q, k, v, 0, True), {})
        return FramedState(KVState(theirs.key(k), theirs.value(v)), theirs.marks)

    @final
    def _step(self, call: AttentionCall, state: FramedState) -> tuple[Tensor, FramedState]:
        return self._prefill(call, state)

    @final
    def _prefill(self, call: AttentionCall, state: FramedState | None) -> tuple[Tensor, FramedState]:
        if state is None:
            framed, mine, theirs = self._framed(call)
            return mine.back(engines.run(framed)), FramedState(KVState(framed.k, framed.v), theirs.marks)
        mine, theirs = self.frames(FramedTokens(call.q, call.k, call.v, state.cache.k.shape[2], True), call.inputs)
        cache = state.cache.append(theirs.key(call.k), theirs.value(call.v))
        marks = None if theirs.marks is None else _joined(state.marks, theirs.marks)
        framed = replace(call, q=mine.query(call.q), k=cache.k, v=cache.v, scoring=self.scoring(marks))
        return mine.back(engines.run(framed)), FramedState(cache, marks)


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    """Concatenate marks along tokens, after expanding shared heads and batch items."""
    assert old is not None
    shared = torch.broadcast_shapes(old.shape[:2], new.shape[:2])
    return torch.cat([old.expand(*shared, -1), new.expand(*shared, -1)], 2)
