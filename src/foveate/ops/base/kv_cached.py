"""Operators that run one engine call over all keys so far: the base of the dense and the sparse family."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, final

from torch import Tensor

from foveate.core import engines
from foveate.core.call import AttentionCall, Plan, StateSizes
from foveate.core.engines import reference
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.streaming import Streaming


class Cached(Streaming):
    """An operator that sends a prepared call to an engine; a streaming step is such a call on a cache."""

    state_type: ClassVar[type[KVState]] = KVState

    @abstractmethod
    def _prepared(self, call: AttentionCall) -> AttentionCall:
        """Return the call that an engine computes."""

    def trim_state(self, state: KVState) -> KVState:
        """Return the state that a stream continues with; override it to drop keys that are never read again."""
        return state

    def selection_macs(self, q: Tensor, k: Tensor, causal: bool) -> int:
        """Count the multiply-adds that choose keys by content or assign them to queries; plans use it."""
        return 0

    def _resumed(self, call: AttentionCall, state: Any) -> AttentionCall:
        """Return the call that an engine computes for a step's query, over what the state holds."""
        return self._prepared(replace(call, k=state.k, v=state.v))

    @final
    def _attend(self, call: AttentionCall) -> Tensor:
        return engines.run(self._prepared(call), call.engine)

    def _weights(self, call: AttentionCall) -> Tensor:
        return reference.weights(self._prepared(call))

    @final
    def _plan(self, call: AttentionCall) -> Plan:
        found = engines.plan(self._prepared(call), call.engine)
        return replace(found, flops=found.flops + 2 * self.selection_macs(call.q, call.k, call.causal))

    @final
    def _init_state(self, sizes: StateSizes) -> KVState:
        shape = sizes.batch, sizes.kv_heads, sizes.key_dim, sizes.value_dim
        return self.state_type.empty(*shape, sizes.dtype, sizes.device)

    @final
    def _step(self, call: AttentionCall, state: KVState) -> tuple[Tensor, KVState]:
        state = self.trim_state(state.append(call.k, call.v))
        return engines.run(self._resumed(call, state), call.engine), state

    @final
    def _prefill(self, call: AttentionCall, state: KVState | None) -> tuple[Tensor, KVState]:
        if state is None:
            return self._attend(call), self.trim_state(self.state_type.of(call.k, call.v))
        if type(self).trim_state is not Cached.trim_state or call.inputs:  # slots of a trimmed state are not positions
            return super()._prefill(call, state)  # of the sequence, and earlier tokens' inputs are gone
        state = state.append(call.k, call.v)
        return self._attend(replace(call, k=state.k, v=state.v)), state
