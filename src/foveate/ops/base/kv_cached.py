"""Operators that are one engine call over all keys so far: what the dense and the sparse family have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from foveate.core import engines
from foveate.core.call import Plan, Problem
from foveate.ops.base.kv_state import KVState
from foveate.ops.operator import Operator


class Cached(Operator):
    """A call is a `Problem` for an engine; streaming is the same call on a growing cache, with one query."""

    @abstractmethod
    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, **inputs: Tensor
    ) -> Problem: ...

    def kept(self, state: KVState) -> KVState:
        """What a stream goes on with: everything, unless a mechanism never looks at some of it again."""
        return state

    def choice_products(self, q: Tensor, k: Tensor, causal: bool) -> int:
        """Multiply-adds before queries read: to choose keys by content, or to share them out. For plans."""
        return 0

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
        return engines.run(self._problem(q, k, v, mask, causal, scale, **inputs), engine)

    @final
    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, engine: str
    ) -> Plan:
        found = engines.plan(self._problem(q, k, v, mask, causal, scale), engine)
        return replace(found, flops=found.flops + 2 * self.choice_products(q, k, causal))

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
    ) -> KVState:
        return KVState.empty(batch, kv_heads, key_dim, value_dim, dtype, device)

    @final
    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, scale: float, **inputs: Tensor
    ) -> tuple[Tensor, KVState]:
        state = self.kept(state.append(k, v))
        return self._attend(q, state.k, state.v, None, True, scale, "auto", **inputs), state

    @final
    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **inputs: Tensor) -> tuple[Tensor, KVState]:
        return self._attend(q, k, v, None, True, scale, "auto", **inputs), self.kept(KVState(k, v))
