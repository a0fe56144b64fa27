"""Selective self-attention: temperatures that keep the weight of a needle, at almost no cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.core import oracle
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.base.scored import Scored
from foveate.ops.dense.selective_self_attention import SelectiveSelfAttention
from foveate.ops.dense.softmax import Softmax
from tests.support.tensors import assert_near, qkv


def active(**options) -> SelectiveSelfAttention:
    """Make an operator with token parts that have an effect, different for each head."""
    op = SelectiveSelfAttention(4, 8, **options).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for token in (op.query_token, op.value_token):
            for parameter in () if token is None else token.parameters():
                parameter.normal_(generator=random)
    return op


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("query_tau", ["pos+tok", "pos", "tok", None])
@pytest.mark.parametrize("value_tau", ["tok", None])
def test_by_hand(variant: str, query_tau: str | None, value_tau: str | None) -> None:
    """Folding temperatures into q and v equals the direct formula with temperatures on logits and values."""
    q, k, v = qkv(7, kv_heads=4)
    op = active(beta=0.5, variant=variant, query_tau=query_tau, value_tau=value_tau)

    def token(module, x):
        return torch.tanh(torch.einsum("bhnd,hd->bhn", F.gelu(x), module.weight) + module.bias[:, None])

    tau = torch.ones(2, 4, 7, dtype=torch.float64)
    if op.position is not None:
        tau = tau + math.exp(-math.exp(0.5)) * torch.arange(1, 8).double().log()
    if op.query_token is not None:
        tau = tau + token(op.query_token, q)
    values = v if op.value_token is None else v * (1 + token(op.value_token, v))[..., None]
    logits = tau[..., None] * (q @ k.transpose(-1, -2)) * 8**-0.5
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(future, float("-inf")).softmax(-1) @ values
    assert_near(op(q, k, v, causal=True), expected, 1e-6)  # beta is float32 until it is cast
    assert op.plan(q, k, v, causal=True).engine == "fused"


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_flat_temperature_is_softmax_attention(variant: str) -> None:
    q, k, v = qkv(9)
    op = SelectiveSelfAttention(4, 8, beta=20.0, kv_heads=2, variant=variant)
    assert_near(op(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_position_temperature(variant: str) -> None:
    op, n = SelectiveSelfAttention(1, 1, beta=1.5, variant=variant), torch.tensor([1, 2, 10, 1000])
    tau = op.position_temperature(n)
    assert tau[0] == 1
    assert (tau.diff() > 0).all()
    assert torch.allclose(tau, 1 + math.exp(-math.exp(1.5)) * n.log(), atol=1e-6), "both variants start alike"


def test_fresh_token_parts_are_neutral() -> None:
    q, k, v = qkv(9)
    assert_near(
        SelectiveSelfAttention(4, 8, query_tau="tok", kv_heads=2)(q, k, v, causal=True),
        oracle.attention(q, k, v, causal=True), 1e-12,
    )  # fmt: skip


def test_it_adds_next_to_no_parameters() -> None:
    op = SelectiveSelfAttention(8, 64)
    block = 4 * 512 * 512
    assert 0 < sum(p.numel() for p in op.parameters()) < 0.005 * block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"head_dim": 2.5}, r"head_dim=2\.5"),
        ({"beta": 99.0}, r"beta=99\.0 must be in -20\.\.20"),
        ({"query_tau": "all"}, "query_tau='all'"),
        ({"value_tau": "pos"}, "value_tau='pos'"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"value_dim": 0}, "value_dim=0"),
        ({"variant": "arxiv"}, "variant='arxiv'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SelectiveSelfAttention(**{"heads": 4, "head_dim": 8, **options})


def test_a_call_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=4, D=6"):
        SelectiveSelfAttention(4, 8)(*qkv(5, width=6), causal=True)
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=2, D=8"):
        SelectiveSelfAttention(4, 8)(*qkv(5), causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        SelectiveSelfAttention(4, 8)(*qkv(5))


def test_a_needle_is_not_diluted(claim) -> None:
    """A key with a margin of 3 over n - 1 equal distractors keeps its weight."""
    n = 4096
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, n, 1)
    k[:, :, n // 3] = 3.0
    op = SelectiveSelfAttention(1, 1, beta=0.0)
    ours, plain = (x.weights(q, k, causal=True, scale=1.0)[0, 0, 0, n // 3].item() for x in (op, Softmax()))
    claim(
        "a temperature that grows with log n counters dilution: weight of a needle among 4,096 keys, score margin 3",
        ours=ours, baseline=plain, better="higher", margin=0.5, baseline_name="softmax",
    )  # fmt: skip
    assert ours > 10 * plain


class Reader(nn.Module):
    """One attention layer with two heads and a read-out."""

    def __init__(self, op: Scored, width: int, extra: int) -> None:
        super().__init__()
        self.op, self.qkv, self.out = op, nn.Linear(3 * width + 1, 96), nn.Linear(32, width)
        self.mlp = nn.Sequential(nn.Linear(width, extra), nn.GELU(), nn.Linear(extra, width)) if extra else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = self.out(self.op(q, k, v, causal=True).transpose(1, 2).flatten(2))
        return y if self.mlp is None else y + self.mlp(y)


def sharp_and_flat(count: int, random: torch.Generator, length: int = 64, width: int = 8):
    """Make a task: half of the tokens ask for one token's note by a noisy cue, half for the mean of notes so far."""
    name, note, noise = torch.randn(3, count, length, width, generator=random)
    name, one = F.normalize(name, dim=-1), (torch.rand(count, length, 1, generator=random) < 0.5).float()
    index = (torch.rand(count, length, generator=random) * torch.arange(1, length + 1)).long()
    index = index[..., None].expand(-1, -1, width)
    cue = F.normalize(name.gather(1, index) + 0.15 * noise, dim=-1)
    mean = note.cumsum(1) / torch.arange(1, length + 1)[:, None]
    return torch.cat([name, note, cue, one], -1), one * note.gather(1, index) + (1 - one) * 3 * mean


def test_it_learns_sharp_and_flat_maps_at_once(claim) -> None:
    """Temperatures learn sharp and flat maps better than an MLP with as many parameters."""

    def loss(op: Scored, extra: int) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, random = Reader(op, 8, extra), torch.Generator().manual_seed(0)
            optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
            for _ in range(250):
                x, y = sharp_and_flat(32, random)
                optimiser.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimiser.step()
        x, y = sharp_and_flat(256, random)
        with torch.no_grad():
            return F.mse_loss(model(x), y).item()

    ours, baseline = loss(SelectiveSelfAttention(2, 16), 0), loss(Softmax(), 4)
    claim(
        "temperatures learn sharp maps for some tokens and flat ones for others: held-out squared error",
        ours=ours, baseline=baseline, better="lower", margin=0.05 * baseline,
        baseline_name="softmax + an MLP of equal size", seed=0,
    )  # fmt: skip
