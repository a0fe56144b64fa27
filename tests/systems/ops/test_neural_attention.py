"""Neural attention: scores of a network from halves that add up, and relations that no bilinear score has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines import chunked
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import safe_softmax
from foveate.ops.dense.neural_attention import NeuralAttention
from foveate.ops.dense.softmax import Softmax
from foveate.ops.operator import Operator
from tests.ops.plans import score_products
from tests.support.tensors import assert_near, gradients, qkv


def built(*args, **options) -> NeuralAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NeuralAttention(*args, **options).double()


def by_hand(op: NeuralAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Compute scores of concatenated pairs, pair by pair."""
    act = torch.relu if op.activation == "relu" else torch.tanh
    out = torch.empty(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            pair = torch.cat([op.reduce_q(q[:, :, i]), op.reduce_k(k[:, :, j])], -1)
            inside = act(op.pair(pair))
            inside = inside if op.hidden is None else act(op.hidden(inside))
            out[:, :, i, j] = op.last(inside)[..., 0]
    return out


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_halves_add_up_to_pairs(layers: int, activation: str) -> None:
    q, k, v = qkv(7, 9, kv_heads=4, width=6, value_width=5)
    op = built(6, 5, layers=layers, activation=activation)
    assert (op.hidden is None) == (layers == 1)
    scores = by_hand(op, q, k)
    assert_near(op.weights(q, k), scores.softmax(-1), 1e-12)
    assert_near(op(q, k, v), scores.softmax(-1) @ v, 1e-12)
    assert_near(op(q, k, v, scale=3.0), (3 * scores).softmax(-1) @ v, 1e-12)
    assert_near(op.weights(q, k).log().diff(), scores.diff(), 1e-9)


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_a_mask_and_causality_combine(kind: str) -> None:
    q, k, v = qkv(8, kv_heads=4)
    op = built(8, 4)
    mask = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    given = mask if kind == "bool" else torch.where(mask, 0.7, masks.NEG_INF).double()
    scores = by_hand(op, q, k) + (0 if kind == "bool" else 0.7)
    expected = safe_softmax(scores.masked_fill(~(mask & masks.causal(8, 8)), masks.NEG_INF)) @ v
    assert_near(op(q, k, v, mask=given, causal=True), expected, 1e-12)


def test_additive_attention() -> None:
    """One layer with tanh is Bahdanau's `w tanh(W q + U k + b)`."""
    q, k, v = qkv(6, kv_heads=4)
    op = built(8, 5, layers=1, activation="tanh")
    w, u = op.pair.weight[:, :5] @ op.reduce_q.weight, op.pair.weight[:, 5:] @ op.reduce_k.weight
    bias = op.pair.bias + op.pair.weight @ torch.cat([op.reduce_q.bias, op.reduce_k.bias])
    inside = torch.tanh((q @ w.T)[:, :, :, None] + (k @ u.T)[:, :, None] + bias)
    assert_near(op(q, k, v), (inside @ op.last.weight[0]).softmax(-1) @ v, 1e-12)


def test_without_a_last_layer_it_is_the_mean() -> None:
    q, k, v = qkv(9, kv_heads=4)
    op = built(8, 4)
    nn.init.zeros_(op.last.weight)
    seen = torch.arange(1, 10, dtype=torch.float64)[:, None]
    assert_near(op(q, k, v, causal=True), v.cumsum(2) / seen, 1e-12)


@pytest.mark.parametrize("size", [16, 64, 200])
def test_chunks_add_up(size: int) -> None:
    q, k, v = qkv(100, grad=True)
    op = built(8, 4)
    leaves = [q, k, v, *op.parameters()]
    expected = op(q, k, v, causal=True, engine="reference")
    near, far = op.prepare(q, k, torch.arange(100))
    out = chunked.attend(AttentionCall(near, far, v, 1.0, None, True, scoring=op.scoring()), size, size)
    assert_near(out, expected, 1e-12)
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        assert_near(ours, theirs, 1e-11)
        assert ours.abs().sum() > 0 or ours.numel() == 1, "a shift of all scores alone changes nothing"


def test_sizes() -> None:
    assert NeuralAttention(256).pair.weight.shape == (8, 16)
    assert NeuralAttention(16).pair.weight.shape == (2, 4)
    op = NeuralAttention(64, 7)
    assert op.hidden.weight.shape == (3, 7)
    assert op.last.weight.shape == (1, 3)
    assert sum(p.numel() for p in op.parameters()) == 2 * (64 * 7 + 7) + (14 * 7 + 7) + (7 * 3 + 3) + (3 + 1)
    assert NeuralAttention(64, 1, layers=1).last.weight.shape == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"proj_dim": 0}, "proj_dim=0"),
        ({"proj_dim": 2.0}, r"proj_dim=2\.0"),
        ({"proj_dim": 1}, "proj_dim=1 must be at least 2"),
        ({"layers": 3}, "layers=3 must be one of 1, 2"),
        ({"activation": "gelu"}, "activation='gelu'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        NeuralAttention(**{"head_dim": 8, **options})


def test_a_call_of_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match="built for D=8; got q with D=6"):
        NeuralAttention(8)(*qkv(5, width=6))


def fit(scores, parameters: list[nn.Parameter], steps: int, lr: float, near: float = 0.3) -> float:
    """Return the held-out accuracy of scores trained to be positive for pairs of close scalars."""
    random, optimiser = torch.Generator().manual_seed(0), torch.optim.Adam(parameters, lr=lr)

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        x = 2 * torch.rand(2, 1, 1, 64, 1, generator=random) - 1
        return torch.cat([x, torch.ones_like(x)], -1), (x[0] - x[1].mT).abs() < near

    for _ in range(steps):
        (q, k), close = sample()
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(scores(q, k), close.float()).backward()
        optimiser.step()
    with torch.no_grad():
        hits = [((scores(q, k) > 0) == close).float().mean() for (q, k), close in (sample() for _ in range(20))]
    return torch.stack(hits).mean().item()


def test_it_learns_relations_that_no_bilinear_score_has(claim) -> None:
    """It decides whether the key is within 0.3 of the query; both are numbers in (-1, 1), embedded as (x, 1)."""
    op = built(2, 16).float()
    at = AttentionCall(*qkv(64, heads=1, kv_heads=1, width=2), 1.0).tile()
    bilinear = nn.Parameter(torch.zeros(2, 2))
    ours = fit(lambda q, k: op.score(*op.prepare(q, k, at.rows), 1.0, at), list(op.parameters()), 500, 0.01)
    theirs = fit(lambda q, k: q @ bilinear @ k.mT, [bilinear], 500, 0.1)
    claim(
        "a small network scores relations that no bilinear form has: accuracy of 'the key is within 0.3 of the query'",
        ours=ours, baseline=theirs, better="higher", margin=0.15, baseline_name="the best q W k", seed=0,
    )  # fmt: skip
    assert ours > 0.95
    assert theirs < 0.8


class Neighbours(nn.Module):
    """One head of attention over tokens, each with a number and a value."""

    def __init__(self, op: Operator) -> None:
        super().__init__()
        self.op, self.q, self.k = op, nn.Linear(1, 16), nn.Linear(1, 16)

    def forward(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self.op(self.q(x)[:, None], self.k(x)[:, None], values[:, None])[:, 0]


def unexplained(make, seed: int, steps: int = 300) -> float:
    """Train to predict the mean value of all tokens within 0.3; return the share of variance unexplained."""
    random = torch.Generator().manual_seed(seed)

    def sample(count: int, random: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, values = 2 * torch.rand(count, 32, 1, generator=random) - 1, torch.randn(count, 32, 1, generator=random)
        near = ((x - x.mT).abs() < 0.3).float()
        return x, values, near / near.sum(-1, keepdim=True) @ values

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Neighbours(make())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x, values, mean = sample(32, random)
        optimiser.zero_grad()
        F.mse_loss(model(x, values), mean).backward()
        optimiser.step()
    with torch.no_grad():
        x, values, mean = sample(500, torch.Generator().manual_seed(77))
        return (F.mse_loss(model(x, values), mean) / mean.var()).item()


def test_it_learns_to_attend_to_neighbours(claim) -> None:
    ours, theirs = unexplained(lambda: NeuralAttention(16, 16), 0), unexplained(Softmax, 0)
    claim(
        "trained end to end, it attends to tokens whose numbers are close: share of variance unexplained",
        ours=ours, baseline=theirs, better="lower", margin=0.3, baseline_name="softmax attention, same projections",
        seed=0,
    )  # fmt: skip


def test_the_cost_of_a_pair() -> None:
    """A pair costs the second hidden layer of 3 numbers and the read-out, or only the read-out of 6 numbers."""
    assert score_products(NeuralAttention(16, 6)) == 6 * 3 + 3
    assert score_products(NeuralAttention(16, 6, layers=1, activation="tanh")) == 6
