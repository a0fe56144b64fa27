"""Aaren: one query for every prefix, by a scan, a recurrence or a matrix, with a state of constant size."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foveate
from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.core.online_softmax import Partial, finish, merge, partial
from foveate.nn import Block, Layer, MultiHeadAttention, Rotary
from foveate.nn.sequence.aaren import AarenLayer
from foveate.ops.dense.softmax import Softmax
from foveate.ops.linear.aaren import BLOCK, Aaren, combine, prefix_attention
from foveate.ops.linear.dsf import state_size
from tests.support.tensors import assert_near, gradients, qkv

FORMS = ("scan", "recurrent", "reference")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(s: Tensor, v: Tensor) -> Tensor:
    """Compute each prefix separately."""
    return torch.cat([s[..., None, : t + 1].softmax(-1) @ v[..., : t + 1, :] for t in range(s.shape[-1])], -2)


@pytest.mark.parametrize("n", [1, 2, 37, BLOCK, BLOCK + 1, 256, BLOCK * BLOCK + 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_are_softmax_over_prefixes(n: int, form: str) -> None:
    s, v = 100 * draw(2, 3, n, dtype=torch.float32), draw(2, 3, n, 5, seed=1, dtype=torch.float32)
    out = prefix_attention(s, v, form)
    assert out.shape == v.shape
    assert_near(out, prefix_attention(s.double(), v.double(), "reference"), 1e-5)
    if n <= 256:
        assert_near(out, by_hand(s.double(), v.double()), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_last_output_is_ordinary_attention(form: str) -> None:
    q, k, v = qkv(70, value_width=5)
    op = Aaren("first")
    expected = oracle.attention(q[:, :, :1].expand_as(q), k, v, causal=True)
    assert_near(op(q, k, v, causal=True, engine=form), expected, 1e-10)
    whole = oracle.attention(q[:, :, :1], k, v)
    assert_near(op(q, k, v, causal=True, engine=form)[:, :, -1:], whole, 1e-10)
    assert_near(op(q, k, v, causal=True, engine=form, scale=3.0)[:, :, -1:], oracle.attention(
        q[:, :, :1], k, v, scale=3.0), 1e-10)  # fmt: skip


@pytest.mark.parametrize("form", ["scan", "recurrent"])
@pytest.mark.parametrize("n", [5, 2 * BLOCK + 7])
def test_gradients_are_those_of_the_matrix(form: str, n: int) -> None:
    leaves = [draw(2, 2, n).mul(3).requires_grad_(), draw(2, 2, n, 3, seed=1).requires_grad_()]
    ours, theirs = (gradients(prefix_attention(*leaves, each), leaves) for each in (form, "reference"))
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other, 1e-10)
        assert one.abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_hidden_tokens_of_a_prefix(form: str) -> None:
    n = BLOCK + 9
    s, v = draw(1, 2, n), draw(1, 2, n, 3, seed=1)
    gone = torch.zeros(n, dtype=torch.bool)
    gone[[0, 1, 2, 7, BLOCK, BLOCK + 1]] = True
    out = prefix_attention(s.masked_fill(gone, float("-inf")), v, form)
    assert not out[:, :, :3].any()
    assert_near(out[:, :, ~gone], prefix_attention(s[..., ~gone], v[:, :, ~gone], "reference"), 1e-12)


def random_part(seed: int) -> Partial:
    return partial(50 * draw(2, 1, 4, seed=seed), draw(2, 4, 3, seed=seed + 1))


def test_combine_is_merge_and_associative() -> None:
    assert combine is merge
    a, b, c = (random_part(seed) for seed in (0, 2, 4))
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    for one, other in zip(left, right, strict=True):
        assert_near(one, other, 1e-10)
    by_name = {"top": torch.maximum(a.top, b.top)}
    by_name["total"] = a.total * (a.top - by_name["top"]).exp() + b.total * (b.top - by_name["top"]).exp()
    by_name["out"] = a.out * (a.top - by_name["top"]).exp() + b.out * (b.top - by_name["top"]).exp()
    for name, expected in by_name.items():
        assert_near(getattr(combine(a, b), name), expected, 1e-12)
    assert_near(finish(left), (left.out / left.total), 1e-12)


# -- streaming ---------------------------------------------------------------------------------------------------------


def numbers(state: object) -> int:
    parts = state if isinstance(state, tuple | list) else vars(state).values()
    return sum(x.numel() if isinstance(x, Tensor) else numbers(x) for x in parts if x is not None and x is not True)


def test_a_stream_gives_the_same_with_a_state_that_does_not_grow() -> None:
    torch.manual_seed(0)
    layers = [Block(AarenLayer(12, 3)) for _ in range(2)]
    x = draw(2, 200, 12, dtype=torch.float32)
    with torch.no_grad():
        expected = layers[1](layers[0](x, causal=True), causal=True)
        states, out, sizes = [layer.init_state(2, dtype=torch.float32) for layer in layers], [], []
        for t in range(200):
            y = x[:, t : t + 1]
            for i, layer in enumerate(layers):
                y, states[i] = layer.step(y, states[i])
            out.append(y)
            sizes.append(sum(numbers(state) for state in states))
    assert_near(torch.cat(out, 1), expected, 1e-5)
    assert set(sizes) == {2 * 2 * 3 * (2 + 4 + 4)}  # two layers of two items, three heads: sums and the query
    cache = Softmax().init_state(2, 3, 3, 4, 4)
    for t in range(1, 4):
        _, cache = Softmax().step(*(draw(2, 3, 1, 4, dtype=torch.float32) for _ in range(3)), cache)
        assert cache.k.numel() + cache.v.numel() == t * 2 * 3 * 8
    assert state_size(Aaren(), 4, 4) == 2 + 4
    assert state_size(Softmax(), 4, 4) is None


def test_going_on_from_a_prompt() -> None:
    q, k, v = qkv(50, value_width=5)
    op = Aaren("first")
    whole = op(q, k, v, causal=True)
    for queries in (40, 3):  # the stream's query is the first one given
        out, state = op.prefill(q[:, :, 40 - queries : 40], k[:, :, :40], v[:, :, :40])
        expected = whole if queries == 40 else op(q[:, :, 37:40].repeat(1, 1, 17, 1)[:, :, :50], k, v, causal=True)
        assert_near(out, expected[:, :, 40 - queries : 40], 1e-10)
        for t in range(40, 50):
            at = slice(t, t + 1)
            y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state)
            assert_near(y, expected[:, :, at], 1e-10)
    out, state = op.prefill(q[:, :, :0], k[:, :, :0], v[:, :, :0])
    assert out.shape == (2, 4, 0, 5)
    assert_near(op.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)[0], whole[:, :, :1], 1e-12)


def test_different_query_rows_are_refused() -> None:
    q, k, v = qkv(9)
    with pytest.raises(OptionError, match="q must be the same in every row"):
        foveate.attend(q, k, v, "aaren", causal=True)
    same = q[:, :, :1].expand_as(q)
    assert_near(foveate.attend(same, k, v, "aaren", causal=True), Aaren("first")(q, k, v, causal=True), 1e-12)
    op = Aaren()
    _, state = op.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], op.init_state(2, 4, 2, 8, 8, dtype=q.dtype))
    with pytest.raises(OptionError, match="q must be the same in every row"):
        op.step(q[:, :, 1:2], k[:, :, 1:2], v[:, :, 1:2], state)
    with pytest.raises(OptionError, match="query='mean' must be one of 'same', 'first'"):
        Aaren("mean")
    with pytest.raises(OptionError, match="form='chunked' must be one of"):
        prefix_attention(q[..., 0], v, "chunked")


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_the_layer_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = AarenLayer(12, 3, bias=True).double(), draw(2, 7, 12)
    q, k, v = (y.unflatten(-1, (3, 4)) for y in (layer.q(layer.token), layer.k(x), layer.v(x)))
    s = torch.einsum("hd,bnhd->bhn", q, k) / 2
    expected = layer.out(by_hand(s, v.transpose(1, 2)).transpose(1, 2).flatten(2))
    assert_near(layer(x, causal=True), expected, 1e-12)
    seen = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    seen[0, ..., :2], seen[1, ..., 4] = False, False
    out = layer(x.masked_fill(~seen[:, 0, 0, :, None], float("nan")), causal=True, mask=seen)
    assert_near(out[0, 2:], layer(x[:1, 2:], causal=True)[0], 1e-12)
    assert_near(out[0, :2], layer.out.bias.expand(2, -1), 1e-12)
    head, state = layer.prefill(x[:, :5])
    assert_near(head, expected[:, :5], 1e-12)
    assert_near(layer.step(x[:, 5:6], state)[0], expected[:, 5:6], 1e-12)
    (grad,) = gradients(layer(x, causal=True), [layer.token])
    assert grad.abs().max() > 1e-3


def test_the_query_is_the_only_extra_parameter() -> None:
    count = lambda layer: sum(p.numel() for p in layer.parameters())  # noqa: E731
    assert count(AarenLayer(64, 4)) == count(MultiHeadAttention(64, 4)) + 64
    with pytest.raises(OptionError, match="heads=5 must divide dim=64"):
        AarenLayer(64, 5)


class Classifier(nn.Module):
    """A classifier of series into two classes, from the last token after two blocks."""

    def __init__(self, make, dim: int = 32) -> None:
        super().__init__()
        self.into = nn.Linear(5, dim)  # each token holds a value and the four before it
        self.blocks = nn.ModuleList([Block(make(dim)) for _ in range(2)])
        self.norm, self.out = nn.RMSNorm(dim), nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(F.pad(x, (4, 0)).unfold(-1, 5, 1))
        for block in self.blocks:
            x = block(x, causal=True)
        return self.out(self.norm(x[:, -1]))


MOTIFS = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0, 1.0]])


def series(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make noise of 64 values in which one of two motifs occurs once."""
    x = 0.7 * torch.randn(size, 64, generator=generator)
    which = torch.randint(2, (size,), generator=generator)
    place = torch.randint(64 - 5, (size, 1), generator=generator) + torch.arange(5)
    return x.scatter_add(1, place, 2 * MOTIFS[which]), which


def learned(make, seed: int) -> float:
    torch.manual_seed(seed)
    model, generator = Classifier(make), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        x, y = series(32, generator)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = series(1000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        return (model(x).argmax(-1) == y).double().mean().item()


def transformer(dim: int) -> Layer:
    return MultiHeadAttention(dim, 4, position=Rotary())


@pytest.mark.slow
def test_it_classifies_series_as_a_transformer_does(claim) -> None:
    ours, baseline = (
        sum(learned(make, seed) for seed in (0, 1, 2)) / 3 for make in (lambda dim: AarenLayer(dim, 4), transformer)
    )
    assert ours > 0.8
    claim(
        "two layers of width 32 find which of two motifs occurs in noise: accuracy after 200 steps, three seeds",
        ours=ours, baseline=baseline - 0.03, better="higher",
        baseline_name="causal softmax attention, less three points", seed=0,
    )  # fmt: skip


def seconds_per_token(lengths: tuple[int, ...]) -> dict[int, list[float]]:
    """Time one more token of a stream after n tokens, by Aaren and by softmax attention, as interleaved minima."""
    calls, best = {}, {n: [float("inf")] * 2 for n in lengths}
    for n in lengths:
        q, k, v = (draw(8, 4, n, 32, seed=s, dtype=torch.float32) for s in range(3))
        token = q[:, :, :1], k[:, :, :1], v[:, :, :1]
        for which, (op, queries) in enumerate(((Aaren(), token[0].expand_as(q)), (Softmax(), q))):
            calls[n, which] = (op, token, op.prefill(queries, k, v)[1])
    for _ in range(30):
        for (n, which), (op, token, state) in calls.items():
            start = time.perf_counter()
            op.step(*token, state)
            best[n][which] = min(best[n][which], time.perf_counter() - start)
    return best


@torch.no_grad()
def test_a_token_costs_the_same_however_long_the_past(claim) -> None:
    after = seconds_per_token((100, 2000))
    assert after[2000][0] < 2 * after[100][0]
    claim(
        "a stream's time per token is constant: microseconds after 2,000 tokens, eight texts, four heads of width 32",
        ours=1e6 * after[2000][0], baseline=0.5e6 * after[2000][1], better="lower",
        baseline_name="half of softmax attention's time",
    )  # fmt: skip


def test_the_plan_by_hand() -> None:
    """The plan counts scores, six merges a token inside blocks of 32, and q, k, v and the output once each."""
    q, k, v = torch.zeros(2, 4, 100, 8), torch.zeros(2, 2, 100, 8), torch.zeros(2, 2, 100, 5)
    op = Aaren()
    plans = {engine: op.plan(q, k, v, causal=True, engine=engine) for engine in ("auto", *FORMS)}
    assert plans["auto"].engine == "scan"
    assert {plan.bytes for plan in plans.values()} == {4 * (2 * 4 * 100 * (8 + 5) + 2 * 2 * 100 * (8 + 5))}
    merges = {"auto": 6, "scan": 6, "recurrent": 1, "reference": 50}
    for engine, each in merges.items():
        assert plans[engine].flops == 2 * 4 * 100 * (2 * 8 + each * 4 * 6)
