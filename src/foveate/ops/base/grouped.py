"""Operators that gather tokens into groups and attend inside them: HyperAttention and routing attention."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import final

from torch import Tensor

from foveate.core import masks
from foveate.core.call import AttentionCall, Plan
from foveate.core.engines import reference
from foveate.core.readable import is_clean
from foveate.ops.operator import Capabilities, Operator


class Grouped(Operator):
    """Attention inside groups of tokens, chosen by their content. Subclasses define four hooks.

    Engines: "groups" gathers the tokens of each group and computes the pairs inside groups alone; "reference" makes the
    whole matrix of weights and serves tests. Queries choose their groups together, so that a token's group may depend
    on later tokens; a weight on a later key is zero in causal calls.
    """

    capabilities = Capabilities(
        patterns=frozenset({"self", "cross", "causal self"}), engines=("groups", "reference"), streaming=None,
        selection_group=None,
    )  # fmt: skip

    @abstractmethod
    def _grouped(self, call: AttentionCall) -> Tensor:
        """Return the output of a call with queries and keys. Keys and values that the mask hides from all are zeros."""

    @abstractmethod
    def _whole(self, call: AttentionCall) -> Tensor:
        """Return the weights `(B, Hq, Nq, Nk)` of the same call; O(N²)."""

    @abstractmethod
    def pairs(self, n_queries: int, n_keys: int, causal: bool) -> float:
        """Return the number of pairs in all groups of one head."""

    @abstractmethod
    def selection_macs(self, call: AttentionCall) -> int:
        """Count the multiply-adds that choose the groups; plans use it."""

    def reference_macs(self, call: AttentionCall, visible: float) -> float:
        """Count the multiply-adds of the engine "reference" for one head, from the pairs that causality allows."""
        return visible * (call.q.shape[3] + call.v.shape[3])

    @final
    def _attend(self, call: AttentionCall) -> Tensor:
        engine = self._engine(call)
        if call.is_empty:
            return call.no_output
        if engine == "groups" and not (call.wants_grad and call.has_garbage()):
            k, v = (masks.without_hidden(x, call.mask) for x in (call.k, call.v))
            out = self._grouped(replace(call, k=k, v=v))
            if is_clean(out) or not call.has_garbage():
                return out
        return reference.apply_weights(self._weights(call), call.grouped(call.v)).to(call.q.dtype)

    @final
    def _weights(self, call: AttentionCall) -> Tensor:
        if call.is_empty:
            return call.q.new_zeros(*call.q.shape[:3], call.n_keys)
        return self._whole(replace(call, k=masks.without_hidden(call.k, call.mask)))

    @final
    def _plan(self, call: AttentionCall) -> Plan:
        engine, (b, h, nq, d), nk = self._engine(call), call.q.shape, call.n_keys
        visible = float(nq * nk - (nq * (nq - 1) // 2 if call.causal else 0))
        pairs = visible if engine == "reference" else min(self.pairs(nq, nk, call.causal), visible)
        macs = pairs * (d + call.v.shape[3])
        if engine == "reference":
            macs = self.reference_macs(call, visible)
        flops = 2 * (b * h * macs + self.selection_macs(call))
        why = "named by the caller" if call.engine != "auto" else "tokens gathered into groups"
        return Plan(engine, int(flops), call.traffic, why, pairs / max(visible, 1.0))
