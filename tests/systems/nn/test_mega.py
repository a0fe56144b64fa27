"""Mega: two forms of the average, gated attention by loops, and chunks that only the average crosses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, UnsupportedPattern
from foveate.nn.parts.ema import DampedEMA
from foveate.nn.sequence.mega import Mega, MegaBlock, MegaState, RotaryBias, laplace
from foveate.ops.functional import linear_forms
from tests.systems.ops.recall import VOCAB, Recall, accuracy, train

BATCH, LENGTH, DIM, Z, E = 2, 11, 6, 4, 5


def tokens(n: int = LENGTH, dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def average(dim: int = DIM, states: int = 3, **options: Any) -> DampedEMA:
    torch.manual_seed(1)
    return DampedEMA(dim, states, **options).double()


def mega(**options: Any) -> Mega:
    """Make a layer with random parameters, so that each has an effect."""
    torch.manual_seed(1)
    layer = Mega(DIM, Z, E, **{"ema_dim": 3, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return layer


# -- the average -------------------------------------------------------------------------------------------------------


def averaged(ema: DampedEMA, x: Tensor, way: int = 0) -> Tensor:
    """Compute the paper's recurrence number by number."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[2]):
            for n in range(ema.states):
                p, damping = (1 / (1 + math.exp(-t[way, c, n].item())) for t in (ema.alpha, ema.delta))
                h = 0.0
                for t in range(x.shape[1]):
                    h = p * ema.beta[way, c, n].item() * x[b, t, c].item() + (1 - p * damping) * h
                    out[b, t, c] += ema.gamma[way, c, n].item() * h / math.sqrt(ema.states)
    return out


@pytest.mark.parametrize("form", ["fft", "recurrent"])
@pytest.mark.parametrize("n", [1, 2, LENGTH])
def test_both_forms_are_the_recurrence(form, n):
    ema, x = average(), tokens(n)
    torch.testing.assert_close(ema(x, form=form), averaged(ema, x) + ema.omega * x)


def test_forms_agree_on_long_inputs_in_float32():
    ema, x = average(16, 16).float(), tokens(200, 16, dtype=torch.float32)
    assert (ema(x) - ema(x, form="recurrent")).abs().max() < 1e-4
    assert ema.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["fft", "recurrent"])
def test_both_directions_include_the_token(form):
    ema, x = average(bidirectional=True), tokens()
    there, back = averaged(ema, x), averaged(ema, x.flip(1), 1).flip(1)
    torch.testing.assert_close(ema(x, form=form), there + back + ema.omega * x)
    lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    kernels = [ema.kernel(LENGTH, way)[:, (lag if way == 0 else -lag).clamp_min(0)] for way in (0, 1)]
    whole = kernels[0] * (lag >= 0) + kernels[1] * (lag <= 0)
    torch.testing.assert_close(ema(x, form=form), torch.einsum("cts,bsc->btc", whole, x) + ema.omega * x)


@pytest.mark.parametrize("form", ["fft", "recurrent"])
def test_hidden_tokens_enter_no_average_but_keep_their_residual(form):
    ema, x = average(bidirectional=True), tokens()
    seen = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = x.masked_fill(~seen[..., None], 0.0)
    expected = averaged(ema, clean) + averaged(ema, clean.flip(1), 1).flip(1) + ema.omega * x
    torch.testing.assert_close(ema(x, seen, form), expected)


def test_steps_and_the_state_after():
    ema, x = average(), tokens()
    state, out = ema.init_state(BATCH, x.dtype, x.device), []
    for t in range(LENGTH):
        y, state = ema.step(x[:, t : t + 1], state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), ema(x))
    torch.testing.assert_close(state, ema.state_after(x))
    assert ema.init_state(1, torch.bfloat16, x.device).dtype == torch.float32


def test_it_is_a_linear_state_with_a_diagonal_transition():
    """Each average is a head of decayed linear attention with one feature."""
    ema, x = average(), tokens()
    p = torch.sigmoid(ema.alpha[0]).flatten()
    decay = torch.log(1 - p * torch.sigmoid(ema.delta[0]).flatten())

    def heads(rate: Tensor) -> Tensor:
        return rate[None, :, None, None].expand(BATCH, -1, LENGTH, 1)

    v = x.mT.repeat_interleave(ema.states, 1)[..., None]
    fq, fk = heads(ema.gamma[0].flatten() / math.sqrt(ema.states)), heads(p * ema.beta[0].flatten())
    start = torch.zeros(BATCH, DIM * ema.states, 1, 1, dtype=x.dtype)
    out = linear_forms.chunked(fq, fk, v, heads(decay)[..., 0], start, 4)
    torch.testing.assert_close(out[..., 0].unflatten(1, (DIM, -1)).sum(2).mT + ema.omega * x, ema(x))


def test_without_averages_it_is_the_identity():
    ema, x = average(), tokens()
    nn.init.zeros_(ema.gamma), nn.init.ones_(ema.omega)
    assert torch.equal(ema(x), x)


def test_the_first_parameters_are_the_releases():
    torch.manual_seed(0)
    ema = DampedEMA(500, 5)
    assert ema.alpha.std().item() == pytest.approx(0.2, rel=0.05) == ema.delta.std().item()
    torch.testing.assert_close(ema.beta.mean((0, 1)), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), rtol=0, atol=0.01)
    assert ema.beta.std(1).mean().item() == pytest.approx(0.02, rel=0.1)
    assert ema.gamma.std().item() == pytest.approx(1, rel=0.1) == ema.omega.std().item()
    layer = Mega(64)
    assert (layer.zdim, layer.hdim, layer.ema.states, layer.bias.table.shape) == (16, 128, 16, (1, 2047))
    for weight in (layer.v.weight, layer.gates.weight, layer.out.weight, layer.gain, layer.bias.table):
        assert weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not layer.shift.any() and not layer.gates.bias.any()


# -- the layer ---------------------------------------------------------------------------------------------------------


def by_hand(layer: Mega, x: Tensor, causal: bool, seen: Tensor) -> Tensor:
    """Compute the layer token by token and key by key."""
    out = torch.zeros_like(x)
    normed = layer.norm(x) if layer.prenorm else x
    m = F.silu(layer.ema(normed, seen, "recurrent"))
    w, b = layer.gates.weight, layer.gates.bias
    values = F.silu(layer.v(normed))
    ends = [DIM, DIM + Z, DIM + Z + E, 2 * DIM + Z + E]
    size = layer.chunk or x.shape[1]
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):

            def gate(at: int, part: int, row: int = i) -> Tensor:
                rows = slice(ends[part - 1] if part else 0, ends[part])
                return w[rows] @ m[row, at] + b[rows]

            q = F.silu(gate(t, 1)) * layer.gain[0] + layer.shift[0]
            keys = [s for s in range(x.shape[1]) if s // size == t // size and seen[i, s] and (s <= t or not causal)]
            dots = [torch.dot(q, F.silu(gate(s, 1)) * layer.gain[1] + layer.shift[1]) for s in keys]
            bias = [layer.bias.bias(torch.tensor([t]), torch.tensor([s]))[0, 0, 0] for s in keys]
            if not keys:
                mixed = torch.zeros(E, dtype=x.dtype)
            elif layer.attention == "softmax":
                logits = torch.stack([d / math.sqrt(Z) + o for d, o in zip(dots, bias, strict=True)])
                mixed = sum(a * values[i, s] for a, s in zip(logits.exp() / logits.exp().sum(), keys, strict=True))
            else:
                scores = [d / len(keys) + o for d, o in zip(dots, bias, strict=True)]
                normal = torch.distributions.Normal(math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi)))
                f = normal.cdf if layer.attention == "laplace" else lambda s: s.clamp_min(0) ** 2
                mixed = sum(f(a) * values[i, s] for a, s in zip(scores, keys, strict=True))
            h = F.silu(gate(t, 3) + layer.out.weight @ (mixed * F.silu(gate(t, 2))) + layer.out.bias)
            u = torch.sigmoid(gate(t, 0))
            out[i, t] = u * h + (1 - u) * x[i, t]
    return out if layer.prenorm else layer.norm(out)


@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [None, 4, 30])
@torch.no_grad()
def test_the_layer_is_the_one_written_with_loops(attention, causal, chunk):
    layer, x = mega(attention=attention, chunk=chunk), tokens()
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(layer(x, causal=causal), by_hand(layer, x, causal, seen))
    seen[0, [2, 8]] = seen[1, [0, 4, 5, 6, 7, 10]] = False  # a whole block of 4 among them
    expected = by_hand(layer, x, causal, seen)
    torch.testing.assert_close(layer(x, mask=seen[:, None, None], causal=causal), expected)
    out = layer(x.masked_fill(~seen[..., None], float("nan")), mask=seen[:, None, None], causal=causal)
    torch.testing.assert_close(out[seen], expected[seen])


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"prenorm": False}, {"bias": "rotary", "chunk": 4}])
@torch.no_grad()
def test_its_variants_too(options):
    layer, x = mega(**options, norm=nn.RMSNorm), tokens()
    assert isinstance(layer.norm, nn.RMSNorm)
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(layer(x), by_hand(layer, x, False, seen))


@pytest.mark.parametrize("options", [{"chunk": 16}, {"chunk": None}, {"chunk": 16, "attention": "laplace"}])
@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("prompt", [0, 15, 16, 17, 32])
@torch.no_grad()
def test_a_stream_is_the_causal_call(options, bias, prompt):
    layer, x = mega(bias=bias, prenorm=bias == "simple", **options), tokens(37)
    expected = layer(x, causal=True)
    first, state = layer.prefill(x[:, :prompt]) if prompt else (x[:, :0], layer.init_state(BATCH, dtype=x.dtype))
    out = [first]
    for t in range(prompt, x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    assert (torch.cat(out, 1) - expected).abs().max() < 1e-10
    assert isinstance(state, MegaState)
    assert state.k.shape[1] == state.v.shape[1] == (5 if options["chunk"] else 37)


@torch.no_grad()
def test_a_chunk_as_long_as_the_input_is_full_attention():
    whole, x = mega(bias="rotary"), tokens()
    blocks = mega(bias="rotary", chunk=LENGTH)
    torch.testing.assert_close(blocks(x), whole(x))


def reach(layer: Mega, at: int) -> Tensor:
    """Return the influence of each token on the output at one position."""
    x = tokens(12).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, causal=True)[:, at].square().sum(), x)
    return grad.abs().sum((0, 2))


def test_only_the_average_crosses_chunks():
    layer = mega(chunk=4)
    assert (reach(layer, 9)[:10] > 1e-6).all()
    with torch.no_grad():  # the input enters in full and the state decays at once: only lag 0
        layer.ema.alpha.fill_(40.0), layer.ema.delta.fill_(40.0)
    local = reach(layer, 9)
    assert (local[8:10] > 1e-6).all()
    assert local[:8].max() < 1e-13


@torch.no_grad()
def test_a_closed_update_gate_returns_the_input():
    layer, x = mega(), tokens()
    layer.gates.bias[:DIM] = -1e3
    assert torch.equal(layer(x), x)


def test_laplace_is_a_bounded_relu_squared():
    s = torch.linspace(-9, 9, 101, dtype=torch.float64)
    assert ((laplace(s) >= 0) & (laplace(s) <= 1)).all()
    middle = torch.tensor(0.5, dtype=torch.float64).sqrt().requires_grad_()
    (slope,) = torch.autograd.grad(laplace(middle), middle)
    assert laplace(middle).item() == pytest.approx(0.5, abs=1e-12) == middle.item() ** 2
    assert slope.item() == pytest.approx(2 * middle.item(), rel=1e-9)  # that of relu²


@torch.no_grad()
def test_biases_depend_on_the_offset_alone():
    bias = RotaryBias(4)
    nn.init.normal_(bias.vectors)
    a, b = (torch.complex(*vector[0].double().unflatten(-1, (2, 2))) for vector in bias.vectors)
    for i, j in ((3, 1), (0, 5), (7, 7)):
        rotated = torch.exp(1j * torch.tensor([1.0, 0.01], dtype=torch.float64) * (i - j))
        found = bias.bias(torch.tensor([i]), torch.tensor([j])).item()
        assert found == pytest.approx((a * rotated * b.conj()).real.sum().item(), abs=1e-5)
    far = mega(reach=2)
    at = torch.arange(5)
    expected = far.bias.table[0][(at - at[:, None]).clamp(-2, 2) + 2]
    torch.testing.assert_close(far.bias.bias(at, at)[0], expected)
    assert mega(chunk=4).bias.table.shape == (1, 7)  # 3 either way
    assert mega(chunk=1)(tokens()).isfinite().all()


def test_declared_capabilities():
    assert (Mega(8).capabilities.growth, Mega(8, chunk=4).capabilities.growth) == ("N²", "N log N")
    both = Mega(8, bidirectional=True)
    assert (both.capabilities.patterns, both.capabilities.streaming) == ({"self"}, None)
    assert (Mega(8).capabilities.patterns, Mega(8).capabilities.streaming) == ({"self", "causal self"}, "exact")
    with pytest.raises(UnsupportedPattern, match='does not define "causal self"'):
        both(tokens(dim=8).float(), causal=True)


def test_the_block_is_the_layer_and_a_feed_forward():
    layer, x = mega(), tokens()
    block = MegaBlock(layer, 9).double()
    y = layer(x, causal=True)
    torch.testing.assert_close(block(x, causal=True), y + block.down(F.silu(block.up(block.norm(y)))))
    assert MegaBlock(layer).up.out_features == 2 * DIM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zdim": 0}, "zdim=0 must be a whole number, at least 1"),
        ({"hdim": 1.5}, "hdim=1.5"),
        ({"ema_dim": 0}, "ema_dim=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"reach": 0}, "reach=0"),
        ({"attention": "sigmoid"}, "attention='sigmoid' must be one of 'softmax', 'laplace', 'relu2'"),
        ({"bias": "alibi"}, "bias='alibi' must be one of 'simple', 'rotary'"),
        ({"bias": "rotary", "zdim": 3}, "zdim=3 must be even"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        Mega(8, **options)


@pytest.mark.parametrize(("options", "message"), [({"states": 0}, "states=0"), ({"dim": 0}, "dim=0")])
def test_bad_averages(options, message):
    with pytest.raises(OptionError, match=message):
        DampedEMA(**{"dim": 4, **options})
    with pytest.raises(OptionError, match="form='scan' must be one of 'fft', 'recurrent'"):
        average()(tokens(), form="scan")
    with pytest.raises(OptionError, match="hidden=0"):
        MegaBlock(Mega(4), 0)


# -- claims ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Layers between an embedding and a linear read-out."""

    def __init__(self, embed: nn.Module, layers: int, outputs: int, without_average: bool = False, **options: Any):
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList([MegaBlock(Mega(32, 16, 64, ema_dim=4, **options)) for _ in range(layers)])
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, outputs)
        for layer in self.layers if without_average else ():
            ema = layer.mixer.ema
            nn.init.zeros_(ema.gamma.requires_grad_(False))
            for parameter in (ema.alpha, ema.delta, ema.beta):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.out(self.norm(x))


@pytest.mark.slow
def test_keys_with_an_average_recall_in_one_layer(claim):
    """A query key asks for the value after it; without the average, attention needs a second layer to join the two."""
    task, found = Recall(pairs=4, length=24), {}
    for without in (False, True):
        torch.manual_seed(0)
        model = Network(nn.Embedding(VOCAB, 32), 1, VOCAB, without)
        found[without] = accuracy(train(model, task, 300, lr=2e-2), task)
    claim(
        "keys with a moving average recall in one layer: share of values recalled, 4 pairs of key and value",
        ours=found[False], baseline=found[True], better="higher", margin=0.3,
        baseline_name="the same layer without its moving average", seed=0,
    )  # fmt: skip


def smooth_signal(size: int, generator: torch.Generator, length: int = 64, back: int = 20) -> tuple[Tensor, Tensor]:
    """Draw a smooth random signal with as much noise, and its sign `back` steps ago."""
    fading = torch.exp(-torch.arange(64.0).flip(0) / 16)
    smooth = F.conv1d(torch.randn(size, 1, length + 63, generator=generator), fading[None, None])[:, 0]
    smooth = smooth / fading.norm()
    target = F.pad(smooth[:, :-back].sign(), (back, 0))
    return (smooth + torch.randn(size, length, generator=generator))[..., None], target


def error(steps: int = 150, back: int = 20, **options: Any) -> float:
    torch.manual_seed(0)
    model, generator = Network(nn.Linear(1, 32), 2, 1, **options), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=steps, pct_start=0.1)

    def loss(size: int, generator: torch.Generator) -> Tensor:
        x, target = smooth_signal(size, generator, back=back)
        return (model(x)[..., 0] - target)[:, back:].square().mean()

    for _ in range(steps):
        optimiser.zero_grad()
        loss(16, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return loss(256, torch.Generator().manual_seed(12345)).item()


@pytest.mark.slow
def test_the_average_carries_information_across_chunks(claim):
    # attention over all tokens finds the position by its bias and smooths without the average; chunks need it
    chunked = error(chunk=16)
    assert chunked < 1.3 * error()
    claim(
        "the average carries information across chunks of 16: squared error of a signal's sign 20 steps ago",
        ours=chunked, baseline=error(chunk=16, without_average=True), better="lower", margin=0.3,
        baseline_name="the same layers without their moving average", seed=0,
    )  # fmt: skip
