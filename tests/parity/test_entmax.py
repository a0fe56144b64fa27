"""Sparse distributions against `entmax`, by the authors of entmax: exact and bisected forms, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.ops.dense.attention_taxonomy import SurveyAttention
from foveate.ops.functional.normalizers import entmax, sparsemax
from tests.parity import peers
from tests.support.tensors import qkv

peer = pytest.importorskip("entmax", reason=peers.MISSING)


def logits(spread: float) -> Tensor:
    z = peers.leaf(3, 5, 17, seed=0, spread=spread)
    return z.detach().masked_fill(torch.arange(17) == 4, -1e4).requires_grad_()  # a key far below has no weight


@pytest.mark.parametrize("spread", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("k", [None, 6])  # theirs may look at the largest few only, if these suffice
def test_sparsemax_and_entmax15_are_exact(spread: float, k: int | None) -> None:
    z = logits(spread)
    peers.agree(lambda: sparsemax(z), lambda: peer.sparsemax(z, dim=-1, k=k), [z], 1e-12)
    peers.agree(lambda: entmax(z, 1.5), lambda: peer.entmax15(z, dim=-1, k=k), [z], 1e-12)


@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 1.75, 2.0, 3.0])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_entmax_is_what_bisection_finds(alpha: float, spread: float) -> None:
    z = logits(spread)
    peers.agree(lambda: entmax(z, alpha), lambda: peer.entmax_bisect(z, alpha, dim=-1, n_iter=60), [z], 1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_entmax_in_the_place_of_the_softmax(causal: bool) -> None:
    leaves = qkv(9, heads=4, kv_heads=2, width=6, value_width=5, grad=True)
    op = SurveyAttention("scaled_dot", "entmax", alpha=1.5)

    def theirs() -> Tensor:
        q, k, v = leaves
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.mT / 6**0.5
        hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
        return peer.entmax15(scores.masked_fill(hidden, float("-inf")) if causal else scores) @ v

    peers.agree(lambda: op(*leaves, causal=causal), theirs, list(leaves), 1e-12)
