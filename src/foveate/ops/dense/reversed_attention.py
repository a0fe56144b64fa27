"""Reversed attention: keys choose queries and send them their values.

Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention (2023), arXiv 2304.03282.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.core import masks, validate
from foveate.core.call import AttentionCall, Plan
from foveate.core.scoring import safe_softmax
from foveate.ops.functional.heads import accumulating, per_query_head
from foveate.ops.operator import Operator


@final
class ReversedAttention(Operator):
    """`softmax over queries of (q kᵀ · scale)`, times v: each column of weights sums to 1, not each row.

    In attention, a query gathers from keys in shares that sum to 1. Here a key (a child) sends its value to queries
    (its parents) in such shares, so a query's total weight measures how much of a parent it is. Outputs add up to the
    values. With the same scores it is the transpose of softmax attention.

    Cost O(Nq Nk D) time, in chunks of keys whose weights the backward pass recomputes: O(block Nq) memory. A key's
    shares depend on all queries, so there is no causal form. The wrong choice if every query needs an output of
    ordinary size: some receive almost nothing.

    Args:
        block: keys in a chunk.

    A mask states which key may send to which query; one of kind "keys" states which may send at all.
    """

    capabilities = replace(
        Operator.capabilities, patterns=frozenset({"self", "cross"}), streaming=None, engines=("chunked", "reference")
    )

    def __init__(self, block: int = 256) -> None:
        super().__init__()
        validate.count("block", block, 1)
        self.block = block

    def _attend(self, call: AttentionCall) -> Tensor:
        mask, heads = call.mask, call.q.shape[1]
        size = self.block if self._engine(call) == "chunked" else max(call.n_keys, 1)
        v = per_query_head(masks.without_hidden(call.v, mask), heads).to(accumulating(call.v.dtype))
        q, k = _wide(call)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        wanted = any(x is not None and x.requires_grad for x in (q, k, v, mask))
        again = size < k.shape[2] and wanted and torch.is_grad_enabled()
        for start in range(0, k.shape[2], size):
            at = slice(start, start + size)
            part = k[:, :, at], v[:, :, at], None if mask is None else masks.columns_of(mask, at)
            out = out + (checkpoint(_sent, q, *part, use_reentrant=False) if again else _sent(q, *part))
        return out.to(call.q.dtype)

    def _weights(self, call: AttentionCall) -> Tensor:
        return _shares(*_wide(call), call.mask).mT.to(call.q.dtype)

    def _plan(self, call: AttentionCall) -> Plan:
        why = "named by the caller" if call.engine != "auto" else "each key needs its scores with all queries at once"
        b, h, nq, width = call.q.shape
        flops = 2 * b * h * nq * call.n_keys * (width + call.v.shape[3])
        return Plan(engine=self._engine(call), flops=flops, bytes=call.traffic, why=why)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=max(1, length // 3))


def _wide(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return scaled queries, and keys with one head for each query head and zeros where no query may see."""
    wide, heads = accumulating(call.q.dtype), call.q.shape[1]
    return call.q.to(wide) * call.scale, per_query_head(masks.without_hidden(call.k, call.mask), heads).to(wide)


def _sent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of the values that these keys send to each query."""
    return _shares(q, k, mask).mT @ v


def _shares(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return each key's shares among the queries, `(B, H, Nk, Nq)`."""
    logits = q @ k.mT
    if mask is not None:
        logits = logits + masks.as_bias(mask, logits.dtype)
    return safe_softmax(logits.mT)
