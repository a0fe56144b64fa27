"""Efficient attention against `linear-attention-transformer`, which multiplies it by `D ** -0.5`.

Its causal form has another normalizer, clamped at 1e-3, and sees whole buckets: we define none.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.nn import MultiHeadAttention
from foveate.ops.linear.efficient_attention import EfficientAttention
from tests.parity import peers
from tests.support.tensors import qkv

peer = pytest.importorskip("linear_attention_transformer.linear_attention_transformer", reason=peers.MISSING)

N, M, D = 7, 9, 6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [M, N])
def test_efficient_attention(masked: bool, n: int) -> None:
    leaves = list(qkv(n, M, heads=3, kv_heads=3, width=D, grad=True))
    seen = torch.arange(M) < torch.tensor([[4], [M]]) if masked else None

    def theirs() -> Tensor:
        q, k, v = leaves
        return peer.linear_attn(q, k.clone(), v.clone(), seen) * D**0.5  # masks in place

    mask = None if seen is None else seen[:, None, None]
    peers.agree(lambda: EfficientAttention()(*leaves, mask=mask), theirs, leaves, 1e-12)


def test_the_layer_around_it() -> None:
    """Only their last projection has a bias; theirs takes in the factor."""
    dim, heads = 18, 3
    ours = MultiHeadAttention(dim, heads, op=EfficientAttention(), bias=True).double()
    for part in (ours.q, ours.k, ours.v):
        part.bias = None
    theirs = peer.SelfAttention(dim, heads).double()
    w, x = peers.weights(ours), peers.leaf(2, N, dim, seed=1)

    def other() -> Tensor:
        given = {f"to_{name}": value for name, value in w.items()}
        return peers.call(theirs, {**given, "to_out.weight": w["out.weight"] * D**0.5}, x)

    peers.agree(lambda: peers.call(ours, w, x), other, {"x": x, **w}, 1e-12)
