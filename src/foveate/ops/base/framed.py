"""Dense attention among tokens that stand in frames of their own: a camera, a place in an image, a time.

A relation of two frames `F_i⁻¹ F_j` splits into halves, so that no pair needs a transform: queries, keys and values go
into the common frame, attention is as ever, and what a query has read goes back into its own frame.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor

from foveate.core import engines, masks
from foveate.core.call import Plan, Problem
from foveate.core.engines import reference
from foveate.core.scoring import SOFTMAX, Scoring
from foveate.ops.base.kv_state import KVState
from foveate.ops.operator import Operator


class Frame(Protocol):
    """Where some tokens stand. Each method treats tokens one by one and is linear in them."""

    @property
    def marks(self) -> Tensor | None:
        """What a scoring asks of tokens besides keys, such as times: `(B, H, N)`, B and H or 1; None where nothing."""

    def query(self, q: Tensor) -> Tensor: ...
    def key(self, k: Tensor) -> Tensor: ...
    def value(self, v: Tensor) -> Tensor: ...
    def back(self, out: Tensor) -> Tensor:
        """From the common frame to those of the tokens: undoes `value`."""


class Tokens(NamedTuple):
    """The tokens of a call: keys at positions `start` and on, queries the last of them."""

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


class Framed(Operator):
    """A system says in `frames` where tokens stand, from a call's inputs, and may bring a `scoring` of its own.

    The base brings masking, causality, engines and streaming: cached keys stay as they are, for frames are absolute.
    """

    has_weights: ClassVar[bool] = False
    state_type: ClassVar[type] = FramedState

    @abstractmethod
    def frames(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> tuple[Frame, Frame]:
        """Where the queries stand, and where the keys."""

    def scoring(self, marks: Tensor | None) -> Scoring:
        """Who scores a call, from the marks of its keys; the fused kernels' softmax unless overridden."""
        return SOFTMAX

    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, **inputs: Tensor
    ) -> tuple[Problem, Frame, Frame]:
        mine, theirs = self.frames(Tokens(q, k, v, 0, causal), inputs)
        k, v = theirs.key(masks.without_hidden(k, mask)), theirs.value(masks.without_hidden(v, mask))
        problem = Problem(mine.query(q), k, v, scale, mask, causal, scoring=self.scoring(theirs.marks))
        return problem, mine, theirs

    @final
    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        engine: str,
        **inputs: Tensor,
    ) -> Tensor:
        problem, mine, _ = self._problem(q, k, v, mask, causal, scale, **inputs)
        return mine.back(engines.run(problem, engine))

    @final
    def _weights(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, **inputs: Tensor
    ) -> Tensor:
        return reference.weights(self._problem(q, k, k, mask, causal, scale, **inputs)[0])

    @final
    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, engine: str
    ) -> Plan:
        return engines.plan(self._problem(q, k, v, mask, causal, scale)[0], engine)

    @final
    def _init_state(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> FramedState:
        sizes = (heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)
        q, k, v = (torch.empty(batch, count, 0, width, dtype=dtype, device=device) for count, width in sizes)
        _, theirs = self.frames(Tokens(q, k, v, 0, True), {})
        return FramedState(KVState(theirs.key(k), theirs.value(v)), theirs.marks)

    @final
    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, scale: float, **inputs: Tensor
    ) -> tuple[Tensor, FramedState]:
        mine, theirs = self.frames(Tokens(q, k, v, state.cache.k.shape[2], True), inputs)
        cache = state.cache.append(theirs.key(k), theirs.value(v))
        marks = None if theirs.marks is None else _joined(state.marks, theirs.marks)
        problem = Problem(mine.query(q), cache.k, cache.v, scale, None, True, scoring=self.scoring(marks))
        return mine.back(engines.run(problem)), FramedState(cache, marks)

    @final
    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **inputs: Tensor) -> tuple[Tensor, FramedState]:
        problem, mine, theirs = self._problem(q, k, v, None, True, scale, **inputs)
        return mine.back(engines.run(problem)), FramedState(KVState(problem.k, problem.v), theirs.marks)


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Marks one after another; those that are shared by heads or batch items are repeated where others are not."""
    shared = torch.broadcast_shapes(old.shape[:2], new.shape[:2])
    return torch.cat([old.expand(*shared, -1), new.expand(*shared, -1)], 2)
