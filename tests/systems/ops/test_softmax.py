"""Softmax attention, and the claim of the Transformer's paper about scaling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import foveate
from foveate.ops.dense.softmax import Softmax
from tests.support.tensors import qkv


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_own_kernel(causal: bool) -> None:
    q, k, v = qkv(33, kv_heads=4, dtype=torch.float32)
    out = foveate.attend(q, k, v, causal=causal)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    assert Softmax().plan(q, k, v, causal=causal).engine == "fused"


def test_the_scale_is_one_over_the_root_of_the_width() -> None:
    q, k, v = qkv(9, width=16)
    assert torch.equal(foveate.attend(q, k, v), foveate.attend(q, k, v, scale=0.25))
    assert torch.allclose(foveate.attend(q, k, v, scale=0.5), foveate.attend(2 * q, k, v))


def test_scaling_keeps_gradients_alive(claim) -> None:
    """Without the scale, the softmax of wide heads saturates and its gradient vanishes (section 3.2.1)."""
    q, k, _ = qkv(64, width=512, heads=2)

    def jacobian(scale: float | None) -> float:
        weights = Softmax().weights(q, k, scale=scale)
        return (weights * (1 - weights)).sum(-1).mean().item()

    claim(
        "without the scale the softmax of wide heads saturates: trace of its Jacobian at D = 512",
        ours=jacobian(None), baseline=jacobian(1.0), better="higher", margin=0.5, baseline_name="no scale", seed=0,
    )  # fmt: skip
