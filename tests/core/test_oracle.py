"""The oracle equals PyTorch's own attention in float64, and is defined where PyTorch is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.core import oracle
from tests.support.tensors import assert_near, qkv


@pytest.mark.parametrize("kind", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 6), (3, 7), (7, 3)])
def test_it_is_scaled_dot_product_attention(n_queries: int, n_keys: int, kind: str | None, scale: float | None) -> None:
    q, k, v = qkv(n_queries, n_keys, value_width=5)
    mask = None
    if kind is not None:
        mask = torch.rand(2, 1, n_queries, n_keys, generator=torch.Generator().manual_seed(0)) > 0.4
        mask[..., 0] = True
    if kind == "float":
        mask = torch.randn(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    assert_near(oracle.attention(q, k, v, mask=mask, scale=scale), expected, 1e-12)


def test_causality() -> None:
    q, k, v = qkv(6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_near(oracle.attention(q, k, v, causal=True), expected, 1e-12)
    last = oracle.attention(q[:, :, -2:], k, v, causal=True)
    assert_near(last, expected[:, :, -2:], 1e-12, "the last queries see the last keys")


def test_rows_that_see_nothing_are_zeros() -> None:
    q, k, v = qkv(3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    weights = oracle.weights(q, k, mask=mask)
    assert torch.equal(weights[:, :, 1], torch.zeros_like(weights[:, :, 1]))
    assert_near(weights.sum(-1)[:, :, [0, 2]], torch.ones(2, 4, 2), 1e-12)
    assert torch.equal(oracle.attention(q, k, v, mask=mask)[:, :, 1], torch.zeros_like(v[:, [0, 0, 1, 1], 1]))


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = qkv(4)
    mask = torch.tensor([True, True, False, True])
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[:, :, 2], dirty_v[:, :, 2] = float("nan"), float("inf")
    assert torch.equal(oracle.attention(q, dirty_k, dirty_v, mask=mask), oracle.attention(q, k, v, mask=mask))


def test_huge_scores_stay_finite() -> None:
    q, k, v = qkv(5)
    assert oracle.attention(q * 1e4, k, v).isfinite().all()
