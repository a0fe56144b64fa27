"""`MultiHeadAttention` with its options against the attention layer of `x-transformers`.

Its softmax and its constants (rotary frequencies, slopes) are in float32: hence the tolerance. Grouped heads are dealt
out in turns there (head h reads keys of head `h mod Hkv`), in runs of neighbours here; rotary pairs are neighbouring
channels there, halves here: rows of the projections are put into another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from foveate.nn import Alibi, MultiHeadAttention, Rotary
from foveate.ops.dense.sigmoid_attention import SigmoidAttention
from foveate.ops.operator import Operator
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.parity import peers
from tests.support.tensors import qkv

peer = pytest.importorskip("x_transformers.x_transformers", reason=peers.MISSING)

DIM, HEADS, D, N, M = 24, 6, 8, 9, 7
LOOSE = 1e-6


def turns(weight: Tensor, kv_heads: int) -> Tensor:
    """Rows of queries, from runs of heads that share keys to turns."""
    return rearrange(weight, "(g r d) ... -> (r g d) ...", g=kv_heads, d=D)


def neighbours(weight: Tensor) -> Tensor:
    """Rows of queries or keys, from pairs in two halves to pairs side by side."""
    return rearrange(weight, "(h two c) ... -> (h c two) ...", two=2, c=D // 2)


def converted(w: dict[str, Tensor], kv_heads: int = HEADS, rotary: bool = False) -> dict[str, Tensor]:
    order = neighbours if rotary else lambda weight: weight
    made = {
        "to_q.weight": turns(order(w["q.weight"]), kv_heads),
        "to_k.weight": order(w["k.weight"]),
        "to_v.weight": w["v.weight"],
        "to_out.weight": turns(w["out.weight"].mT, kv_heads).mT,
    }
    if "q_norm.weight" in w:  # one gain for all heads, kept as what it is more than 1
        for side, heads in (("q", HEADS), ("k", kv_heads)):
            gain = order(w[f"{side}_norm.weight"])
            made[f"{side}_rmsnorm.gamma"] = (gain - 1).expand(heads, 1, D)
    if "gating.weight" in w:
        made["to_v_gate.weight"] = turns(w["gating.weight"], kv_heads)
    return made


def pair(kv_heads: int = HEADS, causal: bool = False, theirs: dict[str, Any] | None = None, **ours: Any) -> tuple:
    layer = MultiHeadAttention(DIM, HEADS, kv_heads=kv_heads, head_dim=D, **ours).double()
    other = peer.Attention(DIM, dim_head=D, heads=HEADS, kv_heads=kv_heads, causal=causal, **(theirs or {})).double()
    return layer, other, peers.weights(layer)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "causal"])
def test_grouped_heads_and_masks(kv_heads: int, kind: str) -> None:
    """Masks are True for what may be seen on both sides; causal, both let the last query see the last key.

    Their `mask` hides keys and also sets the outputs of hidden tokens to 0; `context_mask` only hides keys.
    """
    ours, theirs, w = pair(kv_heads, causal=kind == "causal")
    x, random = peers.leaf(2, N, DIM, seed=1), torch.Generator().manual_seed(2)
    keys = torch.arange(N) < torch.tensor([[4], [N]])
    pairs = (torch.rand(N, N, generator=random) < 0.5) | torch.eye(N, dtype=torch.bool)
    mine = {"keys": {"mask": keys[:, None, None]}, "pairs": {"mask": pairs}, "causal": {"causal": True}}.get(kind, {})
    other = {"keys": {"context_mask": keys}, "pairs": {"attn_mask": pairs}}.get(kind, {})
    peers.agree(
        lambda: peers.call(ours, w, x, **mine),
        lambda: peers.call(theirs, converted(w, kv_heads), x, **other),
        {"x": x, **w},
        LOOSE,
    )


def test_cross_attention() -> None:
    ours, theirs, w = pair(2)
    x, source = peers.leaf(2, N, DIM, seed=1), peers.leaf(2, M, DIM, seed=2)
    keys = torch.arange(M) < torch.tensor([[4], [M]])
    peers.agree(
        lambda: peers.call(ours, w, x, source, mask=keys[:, None, None]),
        lambda: peers.call(theirs, converted(w, 2), x, source, context_mask=keys),
        {"x": x, "source": source, **w},
        LOOSE,
    )


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_positions_and_normalized_queries_and_keys(kv_heads: int, qk_norm: bool) -> None:
    ours, theirs, w = pair(kv_heads, True, {"qk_rmsnorm": qk_norm}, position=Rotary(500.0), qk_norm=qk_norm)
    x = peers.leaf(2, N, DIM, seed=1)
    angles = peer.RotaryEmbedding(D, base=500).double()(torch.arange(N))
    peers.agree(
        lambda: peers.call(ours, w, x, causal=True),
        lambda: peers.call(theirs, converted(w, kv_heads, rotary=True), x, rotary_pos_emb=angles),
        {"x": x, **w},
        LOOSE,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_alibi(causal: bool) -> None:
    """The distance counts both ways. Six heads: no power of two."""
    ours, theirs, w = pair(causal=causal, position=Alibi(HEADS))
    x = peers.leaf(2, N, DIM, seed=1)
    peers.agree(
        lambda: peers.call(ours, w, x, causal=causal),
        lambda: peers.call(theirs, converted(w), x, rel_pos=peer.AlibiPositionalBias(HEADS)),
        {"x": x, **w},
        LOOSE,
    )


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_gates(gate: str) -> None:
    ours, theirs, w = pair(2, True, {"gate_values": True, "swiglu_values": gate == "silu"}, gate=gate)
    x = peers.leaf(2, N, DIM, seed=1)
    peers.agree(
        lambda: peers.call(ours, w, x, causal=True),
        lambda: peers.call(theirs, converted(w, 2), x),
        {"x": x, **w},
        LOOSE,
    )


@pytest.mark.parametrize("name", ["window", "sigmoid"])
def test_operators_inside(name: str) -> None:
    """`max_attend_past=3` leaves a window of 4 tokens, the query's own included; their sigmoid has no bias."""
    op: Operator = SlidingWindow(4, 0) if name == "window" else SigmoidAttention(bias=0.0)
    given = {"max_attend_past": 3} if name == "window" else {"sigmoid": True}
    ours, theirs, w = pair(2, True, given, op=op)
    x = peers.leaf(2, N, DIM, seed=1)
    peers.agree(
        lambda: peers.call(ours, w, x, causal=True),
        lambda: peers.call(theirs, converted(w, 2), x),
        {"x": x, **w},
        LOOSE,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_sigmoid_attention_with_alibi(causal: bool) -> None:
    """Their attention function by itself, with their bias: both sides count the distance both ways."""
    leaves = list(qkv(N, heads=4, kv_heads=4, width=D, grad=True))
    theirs = peer.Attend(heads=4, causal=causal, sigmoid=True)
    bias = peer.AlibiPositionalBias(4)(N, N).double()
    op = SigmoidAttention(bias=-0.5, alibi=True)
    peers.agree(
        lambda: op(*leaves, causal=causal), lambda: theirs(*leaves, attn_bias=bias - 0.5)[0], leaves, LOOSE
    )  # fmt: skip
