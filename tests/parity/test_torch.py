"""Softmax attention and its layer against PyTorch's own: `scaled_dot_product_attention` and `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn import MultiHeadAttention
from foveate.ops.dense.memory_efficient_attention import MemoryEfficientAttention
from foveate.ops.dense.softmax import Softmax
from foveate.ops.operator import Operator
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.parity import peers
from tests.support.tensors import assert_near, qkv

HEADS, WIDTH, N, M = 4, 20, 6, 9


def masks(n: int, m: int) -> dict[str, Tensor | None]:
    """Bool masks, True = may attend, in which every query sees something; and a bias."""
    random = torch.Generator().manual_seed(5)
    keys = torch.ones(2, 1, 1, m, dtype=torch.bool)
    keys[0, ..., 1], keys[1, ..., 3:] = False, False
    pairs = torch.rand(2, HEADS, n, m, generator=random) < 0.6
    pairs[..., 0] = True
    bias = torch.randn(2, HEADS, n, m, generator=random, dtype=torch.float64)
    return {"none": None, "keys": keys, "pairs": pairs, "bias": bias}


# -- the operator ------------------------------------------------------------------------------------------------------

EXACT: dict[str, tuple[Operator, str]] = {
    "softmax, reference": (Softmax(), "reference"),
    "softmax, chunked": (Softmax(), "chunked"),
    "softmax, fused": (Softmax(), "fused"),
    "memory-efficient": (MemoryEfficientAttention(q_chunk=4, k_chunk=5), "auto"),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "bias"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_grouped_heads_masks_and_scales(name: str, kind: str, scale: float | None) -> None:
    op, engine = EXACT[name]
    leaves, mask = list(qkv(N, M, width=8, value_width=5, grad=True)), masks(N, M)[kind]
    peers.agree(
        lambda: op(*leaves, mask=mask, scale=scale, engine=engine),
        lambda: F.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=scale, enable_gqa=True),
        leaves,
        1e-12,
    )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("n, m", [(9, 9), (6, 9)])
def test_causality(name: str, n: int, m: int) -> None:
    """Ours lets the last query see the last key. Theirs counts from the first, so that other lengths need a mask."""
    op, engine = EXACT[name]
    leaves = list(qkv(n, m, grad=True))
    theirs: dict[str, Any] = {"is_causal": True}
    if n != m:
        theirs = {"attn_mask": torch.ones(n, m, dtype=torch.bool).tril(m - n)}
    peers.agree(
        lambda: op(*leaves, causal=True, engine=engine),
        lambda: F.scaled_dot_product_attention(*leaves, enable_gqa=True, **theirs),
        leaves,
        1e-12,
    )


@pytest.mark.parametrize("sinks", [0, 2])
def test_sliding_window_is_a_band_and_sinks(sinks: int) -> None:
    leaves = list(qkv(12, grad=True))
    i, j = torch.arange(12)[:, None], torch.arange(12)
    band = ((j <= i) & (j > i - 4)) | ((j < sinks) & (j <= i))
    peers.agree(
        lambda: SlidingWindow(4, sinks)(*leaves, causal=True),
        lambda: F.scaled_dot_product_attention(*leaves, attn_mask=band, enable_gqa=True),
        leaves,
        1e-12,
    )


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    (q, k, v), mask = qkv(N, M), torch.ones(2, HEADS, N, M, dtype=torch.bool)
    mask[1, 2, 3] = False
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_near(Softmax()(q, k, v, mask=mask), theirs, 1e-12)
    assert not theirs[1, 2, 3].any()


# -- the layer ---------------------------------------------------------------------------------------------------------


def layers() -> tuple[MultiHeadAttention, nn.MultiheadAttention, dict[str, Tensor]]:
    ours = MultiHeadAttention(WIDTH, HEADS, bias=True).double()
    return ours, nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double(), peers.weights(ours)


def converted(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "in_proj_weight": torch.cat([w["q.weight"], w["k.weight"], w["v.weight"]]),
        "in_proj_bias": torch.cat([w["q.bias"], w["k.bias"], w["v.bias"]]),
        "out_proj.weight": w["out.weight"],
        "out_proj.bias": w["out.bias"],
    }


@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "bias"])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention(kind: str, cross: bool) -> None:
    """Their masks say what is hidden, ours what may be seen."""
    ours, theirs, w = layers()
    x, y = peers.leaf(2, N, WIDTH, seed=1), peers.leaf(2, M, WIDTH, seed=2)
    source = y if cross else x
    mask = masks(N, source.shape[1])[kind]
    given: dict[str, Any] = {}
    if mask is not None:
        given = {
            "keys": lambda: {"key_padding_mask": ~mask[:, 0, 0]},
            "pairs": lambda: {"attn_mask": ~mask.flatten(0, 1)},
            "bias": lambda: {"attn_mask": mask.flatten(0, 1)},
        }[kind]()

    def other() -> Tensor:
        return peers.call(theirs, converted(w), x, source, source, need_weights=False, **given)[0]

    leaves = {"x": x, **w, **({"source": y} if cross else {})}
    peers.agree(lambda: peers.call(ours, w, x, y if cross else None, mask=mask), other, leaves, 1e-12)


def test_multi_head_attention_under_causality() -> None:
    ours, theirs, w = layers()
    x, hidden = peers.leaf(2, N, WIDTH, seed=1), nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)

    def other() -> Tensor:
        return peers.call(theirs, converted(w), x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0]

    peers.agree(lambda: peers.call(ours, w, x, causal=True), other, {"x": x, **w}, 1e-12)


def test_weights_of_the_operator_are_those_of_their_heads() -> None:
    ours, theirs, w = layers()
    ours.load_state_dict(w)
    x, mask = peers.leaf(2, N, WIDTH, seed=1).detach(), masks(N, N)["pairs"]
    q, k, _ = ours.projected(x, torch.arange(N))
    given = {"attn_mask": ~mask.flatten(0, 1), "average_attn_weights": False}
    _, expected = peers.call(theirs, converted(w), x, x, x, **given)
    assert_near(ours.op.weights(q, k, mask=mask), expected, 1e-12)
