"""Multi-head embedding attention: heads from one projection, a cache of one head, and its accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention, Rotary
from foveate.nn.sequence.mhe_attention import MultiHeadEmbeddingAttention, mhe_param_count
from tests.support.tensors import assert_near
from tests.systems.nn import lags

DIM, HEADS, WIDTH, LENGTH = 12, 3, 6, 9


def made(mode: str = "mul", spread: float = 1.0, **options) -> MultiHeadEmbeddingAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultiHeadEmbeddingAttention(DIM, HEADS, mode, WIDTH, spread=spread, **options).double()


def tokens(n: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["mul", "add"])
@pytest.mark.parametrize("cross", [False, True])
def test_by_hand(mode: str, cross: bool, bias: bool) -> None:
    layer, x = made(mode, bias=bias), tokens()
    source = tokens(5, seed=2) if cross else x
    heads = []
    for h in range(HEADS):
        q, k, v = layer.q(x), layer.k(source), layer.v(source)
        e = layer.q_heads[h], layer.k_heads[h], layer.v_heads[h]
        q, k, v = ((t + own if mode == "add" else t + t * own) for t, own in zip((q, k, v), e, strict=True))
        heads.append(torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v)
    assert_near(layer(x, source if cross else None), layer.out(torch.cat(heads, -1)), 1e-12)


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_without_embeddings_all_heads_are_one(mode: str) -> None:
    layer, x = made(mode, spread=0.0), tokens()
    alone = F.scaled_dot_product_attention(layer.q(x), layer.k(x), layer.v(x))
    assert_near(layer(x), layer.out(alone.repeat(1, 1, HEADS)), 1e-12)


def test_the_effect_of_key_embeddings() -> None:
    x = tokens()
    for mode, low, high in (("add", 0.0, 1e-10), ("mul", 1e-3, 1e3)):
        layer = made(mode)
        before = layer(x)
        nn.init.normal_(layer.k_heads, generator=torch.Generator().manual_seed(3))
        assert low <= (layer(x) - before).abs().max() <= high


def test_parameters() -> None:
    layer = MultiHeadEmbeddingAttention(64, 8)
    assert sum(p.numel() for p in layer.parameters()) == mhe_param_count(64, 8) == 3 * 64 * 8 + 3 * 8 * 8 + 8 * 8 * 64
    assert mhe_param_count(12, 3, 5) == 3 * 12 * 5 + 3 * 3 * 5 + 3 * 5 * 12
    own, plain = (
        sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("out"))
        for layer in (layer, MultiHeadAttention(64, 8))
    )
    assert plain - own == 3 * 64 * 8 * 7 - 3 * 8 * 8
    assert own <= plain / 6
    for embedding in (layer.q_heads, layer.k_heads, layer.v_heads):
        assert 0.01 < embedding.std() < 0.03


@pytest.mark.parametrize("options", [{}, {"position": Rotary()}, {"bias": True}])
@pytest.mark.parametrize("mode", ["mul", "add"])
def test_the_cache_holds_one_head(mode: str, options: dict) -> None:
    layer, x = made(mode, **options), tokens()
    state, out = layer.init_state(2, dtype=torch.float64), []
    for t in range(LENGTH):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    assert_near(torch.cat(out, 1), layer(x, causal=True), 1e-12)
    assert state.seen == LENGTH
    assert_near(layer.prefill(x)[0], torch.cat(out, 1), 1e-12)
    assert layer.prefill(x)[1].seen == LENGTH
    assert_near(layer.step(x[:, :1], layer.prefill(x)[1])[0], layer.step(x[:, :1], state)[0], 1e-12)
    held = state.op.k.numel() + state.op.v.numel()
    plain = MultiHeadAttention(DIM, HEADS, head_dim=WIDTH).double().prefill(x)[1].op
    assert held == 2 * LENGTH * 2 * WIDTH
    assert HEADS * held == plain.k.numel() + plain.v.numel()


def test_other_operators_keep_a_state_of_their_own() -> None:
    layer, x = made(op="hedgehog"), tokens()
    first, state = layer.prefill(x[:, :-1])
    last, _ = layer.step(x[:, -1:], state)
    assert_near(torch.cat([first, last], 1), layer(x, causal=True), 1e-10)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(mode="sum"), "mode='sum'"),
        (dict(heads=5), "heads=5 must divide dim=12"),
        (dict(spread=-1), "spread=-1"),
        (dict(head_dim=0), "head_dim=0"),
        (dict(op="moh"), "must be an operator"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MultiHeadEmbeddingAttention(DIM, **{"heads": HEADS, **options})


@pytest.mark.slow
def test_embeddings_replace_most_of_the_projections(claim) -> None:
    where = (1, 3, 5, 8)
    ours, one, all_heads = (
        sum(lags.loss(lags.fitted(make, where, seed=seed), where) for seed in (0, 1)) / 2
        for make in (
            MultiHeadEmbeddingAttention,
            lambda dim, heads: MultiHeadAttention(dim, 1, head_dim=dim // heads),
            MultiHeadAttention,
        )
    )
    claim(
        "8 heads by embeddings copy from 4 lags better than one head, by at least a tenth: loss, 2 seeds",
        ours=ours, baseline=0.9 * one, better="lower", baseline_name="one head of the same size, less a tenth", seed=0,
    )  # fmt: skip
    claim(
        "8 heads by embeddings copy from 4 lags as well as 8 separate heads, within 15 %: loss, 2 seeds",
        ours=ours, baseline=1.15 * all_heads, better="lower", baseline_name="multi-head attention plus 15 %", seed=0,
    )  # fmt: skip
