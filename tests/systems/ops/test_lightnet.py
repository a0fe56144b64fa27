"""LightNet: one pass without an order, a running softmax with one, and no decay to tune."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import Layer
from foveate.nn.sequence.lightnet import MDLRPE, MDTPE, LightNet, LightNetLayer, places
from foveate.ops import create
from foveate.ops.linear.lightnet import LightNetAttention
from tests.support.tensors import assert_near, qkv
from tests.systems.nn import digits

ENGINES = pytest.mark.parametrize("engine", ["chunked", "recurrent", "reference"])


def running_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the definition in float64: for each query and channel a softmax over the positions up to it."""
    q, k, v = q.double(), k.double(), v.double()
    out, past = [], k.shape[2] - q.shape[2]
    for i in range(q.shape[2]):
        shares = k[:, :, : past + i + 1].softmax(2)
        state = torch.einsum("bhnd,bhne->bhde", shares, v[:, :, : past + i + 1])
        gate = q[:, :, i] * torch.sigmoid(q[:, :, i])
        out.append(torch.einsum("bhd,bhde->bhe", gate, state))
    return torch.stack(out, 2)


@ENGINES
@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_it_is_a_softmax_over_the_positions_so_far(engine: str, loud: float) -> None:
    q, k, v = qkv(64, heads=2, kv_heads=2, width=16, dtype=torch.float32)
    out = LightNetAttention()(q, loud * k, v, causal=True, engine=engine)
    assert_near(out, running_softmax(q, loud * k, v), 1e-5)


@ENGINES
@pytest.mark.parametrize("hidden", [0, 3])
def test_the_first_tokens_are_as_exact_as_later_ones(engine: str, hidden: int) -> None:
    """The first token has no decay before it; a huge one would cost the digits of its neighbours in sums."""
    q, k, v = qkv(24, heads=2, kv_heads=2, width=16, dtype=torch.float32)
    seen = torch.arange(24) >= hidden
    op, own = LightNetAttention(), slice(hidden, None)
    out = op(q, k, v, mask=seen, causal=True, engine=engine)[:, :, own]
    error = (out - running_softmax(*(x[:, :, own] for x in (q, k, v)))).abs().amax((0, 1, 3))
    assert error[:8].max() < 3e-6
    _, decay = op.encode_keys(k, 1.0, True, ~seen[None, None, :, None], {})
    assert (decay[:, :, hidden] == 0).all()
    assert decay.abs().max() < 50


@ENGINES
def test_gradients_are_those_of_the_definition(engine: str) -> None:
    q, k, v = qkv(9, 21, heads=2, kv_heads=2, width=6, value_width=5, grad=True)
    seen = torch.randn(2, 2, 9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outs = LightNetAttention()(q, k, v, causal=True, engine=engine), running_softmax(q, k, v)
    for ours, theirs in zip(*(torch.autograd.grad((x * seen).sum(), (q, k, v)) for x in outs), strict=True):
        assert_near(ours, theirs, 1e-10)


def test_the_recurrence_of_the_paper() -> None:
    q, k, v = qkv(20, batch=1, heads=1, kv_heads=1, width=5, value_width=3)
    total, state = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    stream, op = None, LightNetAttention()
    stream = op.init_state(1, 1, 1, 5, 3, dtype=torch.float64)
    for t in range(20):
        before, total = total, total + torch.exp(k[0, 0, t])
        state = (before / total)[:, None] * state + (torch.exp(k[0, 0, t]) / total)[:, None] * v[0, 0, t]
        at = slice(t, t + 1)
        out, stream = op.step(q[:, :, at], k[:, :, at], v[:, :, at], stream)
        assert_near(out[0, 0, 0], F.silu(q[0, 0, t]) @ state, 1e-12)
        assert_near(stream.S[0, 0], state, 1e-12)
        assert_near(stream.carry[0, 0, 0], total.log(), 1e-12)


def test_a_stream_of_large_keys() -> None:
    q, k, v = qkv(40, heads=2, kv_heads=1, width=4, dtype=torch.float32)
    k = 300 * k
    op = LightNetAttention()
    state, out = op.init_state(2, 2, 1, 4, 4), []
    for t in range(40):
        y, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        out.append(y)
    assert_near(torch.cat(out, 2), running_softmax(q, *(x.repeat_interleave(2, 1) for x in (k, v))), 1e-4)


def test_a_long_stream_counts_on() -> None:
    q, k, v = (torch.zeros(1, 1, 300, 2) for _ in range(3))
    op = LightNetAttention()
    _, state = op.prefill(q[:, :, :1], torch.full((1, 1, 1, 2), 14.0), v[:, :, :1])  # as after e^14 tokens
    for t in range(300):
        _, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
    assert (state.carry - math.log(math.exp(14) + 300)).abs().max() < 1e-6
    assert (state.sums.dtype, state.carry.dtype) == (torch.float32, torch.float64)


def test_without_order_it_is_one_softmax_over_all_positions() -> None:
    q, k, v = qkv(7, 12, value_width=5, kv_heads=4)
    seen = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    seen[0, ..., :4] = False
    out = LightNetAttention()(q, k, v, mask=seen)
    for b, first in ((0, 4), (1, 0)):
        shares = k[b, :, first:].softmax(1)
        assert_near(out[b], F.silu(q[b]) @ (shares.mT @ v[b, :, first:]), 1e-12)


def test_the_order_of_tokens_does_not_matter_unless_causal() -> None:
    q, k, v = qkv(30, dtype=torch.float32)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    op = LightNetAttention()
    moved = op(*(x[:, :, order] for x in (q, k, v)))
    assert_near(moved, op(q, k, v)[:, :, order], 1e-5)
    causal = op(*(x[:, :, order] for x in (q, k, v)), causal=True)
    assert (causal - op(q, k, v, causal=True)[:, :, order]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [None, 0.25, 3.0])
def test_of_equal_keys_it_reads_the_running_mean(scale: float | None) -> None:
    q, k, v = qkv(50, kv_heads=4, dtype=torch.float32)
    out = LightNetAttention()(q, torch.full_like(k, 1.7), v, causal=True, scale=scale)
    mean = v.cumsum(2) / torch.arange(1, 51)[:, None]
    assert_near(out, F.silu(q).sum(-1, keepdim=True) * mean * (scale or 1.0), 1e-5)


def test_larger_past_keys_decay_less(claim) -> None:
    """In an additive recurrence a token with a large key does not decay with time."""
    n, d = 200, 8
    q, k, v = (torch.zeros(1, 1, n, d) for _ in range(3))
    q[:] = 1.0
    k[:, :, 3], v[:, :, 3] = 12.0, 1.0
    kept = LightNetAttention()(q, k, v, causal=True)[0, 0, -1].mean() / (d * F.silu(torch.ones(())))
    fading = create("lightning_attention_2", decay=[0.95])
    faded = fading(q, (k / 12), v, causal=True)[0, 0, -1].mean() / d
    claim(
        "a salient token stays readable: share of its value that is read 196 tokens later",
        ours=kept.item(), baseline=faded.item(), better="higher", margin=0.9,
        baseline_name="linear attention with a decay of 0.95 per token", seed=None,
    )  # fmt: skip
    assert kept.item() == pytest.approx(1 / (1 + (n - 1) * math.exp(-12)), abs=1e-5)


def test_the_state_is_of_constant_size_and_exact_after_a_prompt() -> None:
    q, k, v = qkv(33, kv_heads=2)
    op = LightNetAttention()
    out, state = op.prefill(q[:, :, :32], k[:, :, :32], v[:, :, :32])
    last, after = op.step(q[:, :, 32:], k[:, :, 32:], v[:, :, 32:], state)
    assert_near(torch.cat([out, last], 2), op(q, k, v, causal=True), 1e-12)
    assert [x.shape for x in (after.sums, after.carry)] == [x.shape for x in (state.sums, state.carry)]


def test_refusals() -> None:
    q, k, v = qkv(6)
    with pytest.raises(OptionError, match="lightnet"):
        create("lightnet", decay=0.9)
    with pytest.raises(UnsupportedPattern, match='mask of kind "pairs"'):
        LightNetAttention()(q, k, v, mask=torch.ones(6, 6, dtype=torch.bool).tril())
    assert LightNetAttention()(q, k[:, :, :0], v[:, :, :0]).abs().max() == 0
    assert LightNetAttention()(q[:, :, :0], k[:, :, :0], v[:, :, :0], causal=True).shape == (2, 4, 0, 8)


# -- positions, layers, the network ------------------------------------------------------------------------------------


def tokens(n: int, dim: int = 12, seed: int = 0, batch: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, dim, generator=random, dtype=torch.float64)


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter from its initial value, so that each has an effect."""
    random = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    return module


def test_lrpe_depends_only_on_differences_of_positions() -> None:
    rotation = shaken(MDLRPE(2, 3, 5))
    q, k = torch.randn(2, 1, 3, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = places(12, (3, 4), q.device)
    assert at.tolist() == [[y, x] for y in range(3) for x in range(4)]
    scores = rotation(q, at) @ rotation(k, at).mT
    gap = (at[:, None] - at).double()
    angle = torch.einsum("ija,ahf->hijf", gap, rotation.theta)
    assert_near(scores, torch.einsum("bhif,bhjf,hijf->bhij", q, k, angle.cos()), 1e-11)
    moved = at + torch.tensor([7, 20])
    assert_near(rotation(q, moved) @ rotation(k, moved).mT, scores, 1e-5)


def test_the_frequencies_of_the_axes_at_first() -> None:
    theta = MDLRPE(2, 1, 5).theta[:, 0]
    first = 10_000 ** (-torch.arange(3) / 3)
    assert_near(theta[0], torch.cat([first, torch.zeros(2)]), 1e-6)
    assert_near(theta[1], torch.cat([torch.zeros(3), first[:2]]), 1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [None, (5, 14)])
def test_tpe_is_a_toeplitz_matrix_on_each_axis(size: tuple[int, int] | None, causal: bool) -> None:
    tpe, x = shaken(MDTPE(6, 1 if size is None else 2, rank=3)), tokens(70, 6)
    expected = x.clone()
    shape = (70,) if size is None else size
    at = places(70, size, x.device)
    for axis, length in enumerate(shape):
        lag = torch.arange(length)[:, None] - torch.arange(length)
        kernel = torch.zeros(6, length, length, dtype=torch.float64)
        for r in range(3):
            fade = torch.exp(-tpe.log_rate[axis, :, r].exp()[:, None, None] * lag.abs())
            kernel = kernel + tpe.weight[axis, :, r, None, None] * fade
        kernel = kernel.tril() if causal else kernel
        # tokens of the same row (or column), and the weights between their positions in it
        others = [other for other in range(len(shape)) if other != axis]
        same = torch.stack([at[:, None, o] == at[:, o] for o in others]).all(0) if others else torch.ones(70, 70)
        full = kernel[:, at[:, axis][:, None], at[:, axis]] * same
        expected = expected + torch.einsum("cij,bjc->bic", full, x)
    assert_near(tpe(x, size, causal), expected, 1e-10)


def test_tpe_starts_small_and_reaches_far() -> None:
    tpe = MDTPE(4, 2, rank=5, generator=torch.Generator().manual_seed(0))
    rates = tpe.log_rate.exp()
    assert rates.max() == 1
    assert rates.min().item() == pytest.approx(math.exp(-4))
    assert 0 < tpe.weight.abs().max() < 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lrpe", [False, True])
def test_the_layer_is_its_formula(causal: bool, lrpe: bool) -> None:
    layer, x = shaken(LightNetLayer(12, 3, expand=5, lrpe=lrpe, gate_rank=7)), tokens(20)
    q, k, v = ((x @ w.weight.mT).unflatten(-1, (3, -1)).transpose(1, 2).detach() for w in (layer.q, layer.k, layer.v))
    at = torch.arange(20.0, dtype=torch.float64)[:, None]
    gap = at[:, None] - at
    flat = torch.zeros(3, 5, dtype=torch.float64)
    rotation = torch.cos(gap * (layer.lrpe.theta[0] if lrpe else flat)[:, None, None])
    rows = []
    for i in range(20):
        seen = slice(0, i + 1 if causal else 20)
        shares = k[:, :, seen].softmax(2)
        rows.append(
            torch.einsum("bhf,bhjf,hjf,bhje->bhe", F.silu(q[:, :, i]), shares, rotation[:, i, seen], v[:, :, seen])
        )
    mixed = torch.stack(rows, 1).flatten(2)
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    gate = F.silu(x @ layer.gate[0].weight.mT @ layer.gate[1].weight.mT)
    assert_near(layer(x, causal=causal), (normed * gate) @ layer.out.weight.mT, 1e-9)


@pytest.mark.parametrize("lrpe", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_of_a_layer_has_no_effect(lrpe: bool, causal: bool) -> None:
    layer, x = shaken(LightNetLayer(12, 3, expand=4, lrpe=lrpe)), tokens(15)
    seen = torch.arange(15) >= 4
    dirty = x.masked_fill(~seen[:, None], float("nan"))
    out = layer(dirty, mask=seen[None, None, None], causal=causal)
    assert_near(out[:, 4:], layer(x[:, 4:], causal=causal), 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_of_a_layer_keeps_its_sums_and_places(causal: bool) -> None:
    layer, x = shaken(LightNetLayer(12, 3, expand=4)).bfloat16(), tokens(400).bfloat16()
    out, exact = layer(x, causal=causal), layer.double()(x.double(), causal=causal)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 0.02 * exact.norm()


def test_only_positions_distinguish_tokens() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    x = tokens(12)
    for tpe, lrpe in ((False, False), (True, False), (False, True)):
        net = shaken(LightNet(12, 2, 3, axes=2, tpe=tpe, lrpe=lrpe, expand=4))
        off = (net(x[:, order], (3, 4)) - net(x, (3, 4))[:, order]).abs().max()
        assert off > 1e-2 if tpe or lrpe else off < 1e-10


def test_a_causal_network_ignores_the_future() -> None:
    net, x = shaken(LightNet(12, 2, 3, expand=4)), tokens(90)
    changed = x.clone()
    changed[:, 50:] += 1
    assert_near(net(changed, causal=True)[:, :50], net(x, causal=True)[:, :50], 1e-10)
    assert (net(changed)[:, :50] - net(x)[:, :50]).abs().max() > 1e-3


def test_a_layer_without_lrpe_streams() -> None:
    layer, x = shaken(LightNetLayer(12, 3, expand=4, lrpe=False)), tokens(10)
    state, out = layer.init_state(2, dtype=torch.float64), []
    for t in range(10):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    assert_near(torch.cat(out, 1), layer(x, causal=True), 1e-10)
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        LightNetLayer.example(12, 3, 10).init_state(1)


def test_layers_refuse() -> None:
    x = tokens(12).float()
    for options, message in (
        ({"heads": 5}, "heads=5 must divide dim=12"),
        ({"heads": 3, "axes": 3}, "axes=3"),
        ({"heads": 3, "expand": 0}, "expand=0"),
        ({"heads": 3, "gate_rank": 0}, "gate_rank=0"),
        ({"heads": 3, "op": create("lightnet")}, "lrpe=True must be False with op=LightNetAttention"),
    ):
        with pytest.raises(OptionError, match=message):
            LightNetLayer(12, **options)
    with pytest.raises(UnsupportedPattern, match='does not define "causal self"'):
        LightNetLayer(12, 3, axes=2)(x, causal=True, size=(3, 4))
    with pytest.raises(ShapeError, match="size=None"):
        LightNet(12, 1, 3, axes=2)(x)
    with pytest.raises(ShapeError, match="axes=1"):
        LightNet(12, 1, 3)(x, (3, 4))


class RasterScan(Layer):
    """The same layer around linear attention with fixed decays, row after row: the earlier single scan."""

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}))

    def __init__(self, dim: int, heads: int, layer: int) -> None:
        super().__init__(dim, heads)
        op = create("lightning_attention", layer=layer, depth=2, block=16)
        self.inner = LightNetLayer(dim, heads, expand=16, lrpe=False, gate_rank=16, op=op)

    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, **inputs: object) -> Tensor:
        return self.inner(x, causal=True)


def read_right(kind: str, seed: int) -> float:
    made = count()

    def make(dim: int, heads: int) -> Layer:
        layer = next(made)
        if kind == "raster":
            return RasterScan(dim, heads, layer)
        return LightNetLayer(dim, heads, expand=16, lrpe=False, gate_rank=16)

    net = digits.vit(make, dim=32, heads=2, patch=2, seed=seed)
    return digits.accuracy(digits.fit(net, seed=seed, epochs=EPOCHS))


EPOCHS = 10


@pytest.mark.slow
def test_one_pass_reads_digits_better_than_one_raster_scan(claim) -> None:
    ours, scan = (sum(read_right(kind, seed) for seed in (0, 1, 2)) / 3 for kind in ("lightnet", "raster"))
    claim(
        f"one pass classifies images: accuracy on 450 digits, 16 tokens, two layers, {EPOCHS} epochs, three seeds",
        ours=ours, baseline=scan, better="higher", margin=0.01,
        baseline_name="one raster scan with Lightning Attention's fixed decays, the same parameters", seed=0,
    )  # fmt: skip
