"""Attention in chunks against `memory-efficient-attention-pytorch`, which adds 1e-8 to every row's sum.

Causality counts from the first query there, so that only as many queries as keys compare.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.nn import MultiHeadAttention
from foveate.ops.dense.memory_efficient_attention import MemoryEfficientAttention
from tests.parity import peers
from tests.support.tensors import qkv

peer = pytest.importorskip("memory_efficient_attention_pytorch.memory_efficient_attention", reason=peers.MISSING)

N, M = 11, 14
TOLERANCE = 2e-8  # rows' sums, less their largest logit, are at least 1


@pytest.fixture(autouse=True)
def no_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checkpoints, which save memory and change no number, allow no `torch.autograd.grad`."""
    monkeypatch.setattr(peer, "checkpointed_summarize_qkv_chunk", peer.summarize_qkv_chunk)


@pytest.mark.parametrize("q_chunk, k_chunk", [(4, 5), (1, 1), (16, 16), (3, 16)])
@pytest.mark.parametrize("kind", ["none", "keys", "bias", "causal"])
def test_chunks(q_chunk: int, k_chunk: int, kind: str) -> None:
    leaves = list(qkv(N, N if kind == "causal" else M, heads=3, kv_heads=3, grad=True))
    keys = torch.arange(M) < torch.tensor([[6], [M]])
    bias = peers.leaf(1, 3, N, M, seed=3)
    mine = {"keys": {"mask": keys[:, None, None]}, "bias": {"mask": bias}, "causal": {"causal": True}}.get(kind, {})
    other = {"keys": {"mask": keys}, "bias": {"attn_bias": bias}, "causal": {"causal": True}}.get(kind, {})
    op = MemoryEfficientAttention(q_chunk, k_chunk)

    def theirs() -> Tensor:
        sizes = {"q_bucket_size": q_chunk, "k_bucket_size": k_chunk}
        return peer.memory_efficient_attention(*leaves, **other, **sizes)

    peers.agree(lambda: op(*leaves, **mine), theirs, [*leaves, *([bias] if kind == "bias" else [])], TOLERANCE)


def test_the_layer_around_it() -> None:
    """Keys and values come from one projection there."""
    dim, heads, width = 20, 3, 6
    ours = MultiHeadAttention(dim, heads, head_dim=width, op=MemoryEfficientAttention(4, 5)).double()
    theirs = peer.Attention(
        dim=dim, heads=heads, dim_head=width, causal=True, memory_efficient=True, q_bucket_size=4, k_bucket_size=5
    ).double()
    w, x = peers.weights(ours), peers.leaf(2, N, dim, seed=1)

    def other() -> Tensor:
        given = {
            "to_q.weight": w["q.weight"],
            "to_kv.weight": torch.cat([w["k.weight"], w["v.weight"]]),
            "to_out.weight": w["out.weight"],
        }
        return peers.call(theirs, given, x)

    peers.agree(lambda: peers.call(ours, w, x, causal=True), other, {"x": x, **w}, TOLERANCE)
