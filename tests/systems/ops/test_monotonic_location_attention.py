"""Monotonic location attention: its steps over the source do not depend on the source's length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnsupportedEngine, UnsupportedPattern
from foveate.nn.seq2seq.monotonic_location import MonotonicLocationSeq2Seq, backwards
from foveate.ops.dense.monotonic_location_attention import MonotonicLocationAttention, softstair
from tests.support.tensors import assert_near, gradients, qkv

KINDS = ("onestep", "relu", "controlled_relu", "softstair", "free")

PADDING = {
    "none": torch.ones(2, 11, dtype=torch.bool),
    "right": torch.arange(11) < torch.tensor([[11], [7]]),
    "left": torch.arange(11) >= torch.tensor([[3], [10]]),
}


def built(heads: int = 4, **options) -> MonotonicLocationAttention:
    op = MonotonicLocationAttention(8, heads, **options).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.normal_(0, 0.5, generator=random)
    return op


def steps_by_hand(op, rho: float) -> float:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    if op.step_kind == "onestep":
        return sigmoid(5 * rho)
    if op.step_kind == "softstair":
        return math.floor(rho) + sigmoid(20 * (rho - math.floor(rho) - 0.5))
    if op.step_kind == "free":
        return rho
    if op.step_kind == "relu":
        return max(rho, 0.0)
    share = sigmoid(op.step_bias.item())
    return share * max(rho, 0.0) + (1 - share) * sigmoid(5 * rho)


@torch.no_grad()
def by_hand(op, q, k, v, scale: float, seen) -> torch.Tensor:
    """Compute the formulas query by query."""
    (b, h, nq, _), nk = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    out = q.new_zeros(b, h, nq, v.shape[3])
    for ib in range(b):
        keys = [j for j in range(nk) if seen[ib, j]]
        size = len(keys)
        places = torch.arange(size).double() / max(1, size - 1)
        for ih in range(h):
            past = 0.0
            for i in range(nq):
                state = q[ib, ih, i]
                p = op.position[ih].T @ state + op.position_bias[ih]
                sigma = (max((p @ op.w_sigma[ih]).item(), 0) + 0.27) / size
                mu = past + steps_by_hand(op, (p @ op.w_rho[ih]).item()) / max(1, size - 1)
                bell = torch.exp(-((places - mu) ** 2) / (2 * sigma**2))
                weights = bell = bell / bell.sum()
                if op.w_gate is not None:
                    gate = torch.sigmoid(state @ op.w_gate[ih] + op.gate_bias[ih])
                    weights = gate * bell + (1 - gate) * (scale * k[ib, ih, keys] @ state).softmax(0)
                past = ((bell if op.past == "location" else weights) @ places).item()
                out[ib, ih, i] = weights @ v[ib, ih, keys]
    return out


@pytest.mark.parametrize("step", KINDS)
@pytest.mark.parametrize("options", [{}, {"mix": True}, {"mix": True, "past": "location"}])
@pytest.mark.parametrize("padding", PADDING)
def test_by_hand(step: str, options: dict, padding: str) -> None:
    op = built(step=step, **options)
    q, k, v = qkv(6, 11, value_width=5)
    seen = PADDING[padding]
    mask = None if padding == "none" else seen[:, None, None]
    for scale in (None, 0.9):
        expected = by_hand(op, q, k, v, 8**-0.5 if scale is None else scale, seen)
        assert_near(op(q, k, v, mask=mask, scale=scale), expected, 1e-9)
    weights = op.weights(q, k, mask=mask)
    assert_near(weights.sum(-1), torch.ones(2, 4, 6), 1e-12)
    assert not weights[~seen[:, None, None].expand(weights.shape)].any()


@pytest.mark.parametrize("options", [{}, {"mix": True}, {"mix": True, "past": "location"}])
def test_a_walk_continues_from_its_end(options: dict) -> None:
    op = built(step="relu", **options)
    q, k, v = qkv(6, 11)
    mask = PADDING["right"][:, None, None]
    whole, end = op.walk(q, k, v, mask=mask, scale=0.9)
    assert_near(whole, op(q, k, v, mask=mask, scale=0.9), 1e-12)
    first, past = op.walk(q[:, :, :2], k, v, mask=mask, scale=0.9)
    second, last = op.walk(q[:, :, 2:], k, v, past, mask=mask, scale=0.9)
    assert_near(torch.cat([first, second], 2), whole, 1e-12)
    assert_near(last, end, 1e-12)
    assert past.any()
    with pytest.raises(ShapeError, match=r"past must be \(B, Hq, 1\)=\(2, 4, 1\); got \(2, 4\)"):
        op.walk(q, k, v, past[..., 0])


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("past", [None, 0.4])
def test_without_queries_a_walk_stays_in_place(mix: bool, past: float | None) -> None:
    op = MonotonicLocationAttention(8, 4, mix=mix).double()
    q, k, v = qkv(9, value_width=5)
    start = None if past is None else torch.full((2, 4, 1), past, dtype=torch.float64)
    out, end = op.walk(q[:, :, :0], k, v, start)
    assert out.shape == (2, 4, 0, 5)
    assert out.dtype == q.dtype
    assert_near(end, torch.full((2, 4, 1), past or 0.0, dtype=torch.float64), 0.0)
    assert_near(op.walk(q, k, v, end)[0], op.walk(q, k, v, start)[0], 0.0)
    assert op(q[:, :, :0], k, v).shape == (2, 4, 0, 5)


def test_softstair() -> None:
    x = torch.tensor([-0.9, 0.1, 1.0, 1.4, 1.6, 2.49, 2.51])
    assert_near(softstair(x), torch.tensor([-1.0, 0.0, 1.0, 1.12, 1.88, 2.45, 2.55]), 5e-3)


def forced(rho: float, size: int, **options) -> torch.Tensor:
    """Return weights `(size, size)` of queries with a given rho and the narrowest bell."""
    op = MonotonicLocationAttention(4, **options).double()
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.zero_()
        op.position_bias[:, 0], op.w_rho[:, 0] = 1.0, rho
    q = torch.randn(1, 1, size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return op.weights(q, q)[0, 0]


@pytest.mark.parametrize("size", [5, 50, 500])
@pytest.mark.parametrize(("step", "rho"), [("onestep", 10.0), ("relu", 1.0), ("softstair", 1.01), ("free", 1.0)])
def test_a_step_of_one_walks_any_source(size: int, step: str, rho: float) -> None:
    places = forced(rho, size, step=step).argmax(-1)
    assert torch.equal(places, torch.arange(1, size + 1).clamp_max(size - 1))


def test_free_steps_go_back() -> None:
    op = MonotonicLocationAttention(4, step="free").double()
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.zero_()
        op.position[0, 0, 0] = op.w_rho[0, 0] = 1.0
    q = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    q[0, 0, :, 0] = torch.tensor([5.0, -2.0, 4.0, -1.0])
    assert op.weights(q, torch.zeros(1, 1, 20, 4).double())[0, 0].argmax(-1).tolist() == [5, 3, 7, 6]


@pytest.mark.parametrize(("wider", "back"), [(0.4, 1e-4), (0.0, 0.5 / 39)])
def test_one_step_never_goes_back(wider: float, back: float) -> None:
    """Expected positions never decrease away from the ends, up to half a token for a bell that snaps to positions."""
    op = built(step="onestep")
    with torch.no_grad():
        op.position[:, :, 0], op.position_bias[:, 0], op.w_sigma[:] = 0.0, wider, 0.0
        op.w_sigma[:, 0] = 1.0
    q, k, _ = qkv(30, 40)
    at = op.weights(q, k) @ torch.linspace(0, 1, 40, dtype=torch.float64)
    inside = (at[:, :, :-1] > 0.1) & (at[:, :, 1:] < 0.9)
    assert inside.sum() > 50
    assert at.diff(dim=-1)[inside].min() > -back
    assert at.diff(dim=-1).max() < 1.5 / 39


def test_the_gate_mixes_bell_and_content() -> None:
    q, k, v = qkv(6, 11, kv_heads=4)
    op = built(mix=True)
    nn.init.zeros_(op.w_gate)
    alone = MonotonicLocationAttention(8, 4).double()
    alone.load_state_dict({name: x for name, x in op.state_dict().items() if "gate" not in name})
    nn.init.constant_(op.gate_bias, -1e4)
    assert_near(op(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-12)
    nn.init.constant_(op.gate_bias, 1e4)
    assert_near(op(q, k, v), alone(q, k, v), 1e-12)


def test_every_weight_gets_a_gradient() -> None:
    q, k, v = qkv(6, 11, grad=True)
    op = built(step="controlled_relu", mix=True)
    for grad in gradients(op(q, k, v), [q, k, v, *op.parameters()]):
        assert grad.any()
    assert not gradients(built()(q, k, v), [k])[0].any(), "without a mixture keys have no effect"


def test_initial_values() -> None:
    """Weights start in Xavier's and linear layers' bounds; the learned mix of steps starts at forward jumps."""
    op = MonotonicLocationAttention(50, 2, step="controlled_relu", mix=True)
    for weight, bound in (
        (op.position, (6 / 100) ** 0.5), (op.w_sigma, (6 / 51) ** 0.5), (op.w_rho, (6 / 51) ** 0.5),
        (op.w_gate, (6 / 51) ** 0.5), (op.position_bias, 50**-0.5),
    ):  # fmt: skip
        assert 0.9 * bound < weight.abs().max() <= bound
    assert op.gate_bias.abs().max() <= 50**-0.5
    assert op.step_bias == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"heads": 0}, "heads=0"),
        ({"step": "sigmoid"}, "step='sigmoid'"),
        ({"mix": 0.5}, r"mix=0\.5"),
        ({"past": "content"}, "past='content'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MonotonicLocationAttention(**{"head_dim": 8, **options})


def test_calls_that_do_not_fit() -> None:
    q, k, v = qkv(6, 11)
    op = built()
    with pytest.raises(UnsupportedPattern, match='does not define "causal cross"'):
        op(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "causal self"'):
        op(k, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not take a mask of kind "bias"'):
        op(q, k, v, mask=torch.zeros(6, 11))
    with pytest.raises(UnsupportedPattern, match='does not take a mask of kind "pairs"'):
        op.walk(q, k, v, mask=torch.ones(6, 11, dtype=torch.bool))
    assert not hasattr(op, "init_state"), "it needs the whole source"
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=2, D=8"):
        op(q[:, :2], k, v)
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=4, D=4"):
        op(q[..., :4], k[..., :4], v)
    with pytest.raises(UnsupportedEngine, match='engine="fused" cannot run MonotonicLocationAttention'):
        op(q, k, v, engine="fused")
    assert op.plan(q, k, v).flops == 2 * 2 * 4 * 6 * 11 * 16


# -- the network -------------------------------------------------------------------------------------------------------


def network(seed: int = 0, **options) -> MonotonicLocationSeq2Seq:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MonotonicLocationSeq2Seq(**{"vocab": 11, "hidden": 8, "embed": 6, "dropout": 0.0, **options}).double()
        nn.init.normal_(model.decoder.out_bias)
        return model


def copies(count: int, low: int, high: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Make strings over ten tokens, padded with zeros, and their lengths."""
    length = torch.randint(low, high + 1, (count,), generator=random)
    tokens = torch.randint(1, 11, (count, high), generator=random)
    return tokens * (torch.arange(high) < length[:, None]), length


@pytest.mark.parametrize("options", [{}, {"mix": True, "step": "relu"}, {"mix_direction": True, "past": "location"}])
def test_the_network_by_hand(options: dict) -> None:
    """The network equals plain loops over one unpadded example."""
    model = network(**options)
    inner = model.decoder
    tokens, lengths = copies(3, 2, 7, torch.Generator().manual_seed(2))
    targets, logits = tokens.flip(1), model(tokens, lengths, tokens.flip(1))
    for row, n in enumerate(lengths.tolist()):
        x = torch.cat([model.first[None], inner.embed(tokens[row, :n]), model.last[None]])
        states, final_state = model.encoder(x)
        h = final_state.flatten()
        if model.direction is not None:
            beta = torch.sigmoid(5 * model.direction(h))
            states = beta * states + (1 - beta) * states.flip(0)
        keys, values = inner.keys(states), F.leaky_relu(inner.values(states))
        past, word = None, inner.start
        for t in range(targets.shape[1]):
            found, past = inner.attention.walk(h[None, None, None], keys[None, None], values[None, None], past)
            h = inner.cell(torch.cat([word, inner.compose(found.flatten())]), h)
            assert_near(logits[row, t], inner.narrow(h) @ inner.embed.weight.T + inner.out_bias, 1e-12)
            word = inner.embed(targets[row, t])


def test_the_networks_defaults() -> None:
    model = MonotonicLocationSeq2Seq(5)
    assert model.decoder.keys.weight.shape == (128, 128)
    assert model.decoder.embed.weight.shape == (5, 64)
    assert (model.dropout.p, model.direction, model.decoder.attention.w_gate) == (0.5, None, None)
    assert (model.decoder.attention.step_kind, model.decoder.attention.past) == ("onestep", "mixed")


def test_directions() -> None:
    x = torch.arange(12.0).reshape(2, 6, 1)
    assert backwards(x, torch.tensor([4, 6]))[..., 0].tolist() == [[3, 2, 1, 0, 4, 5], [11, 10, 9, 8, 7, 6]]
    tokens, lengths = copies(3, 2, 7, torch.Generator().manual_seed(2))
    ahead, turning = network(), network(mix_direction=True)
    turning.load_state_dict(ahead.state_dict(), strict=False)
    nn.init.zeros_(turning.direction.weight)
    plain = ahead.read(tokens, lengths).memory
    for bias, expected in ((1e4, plain), (-1e4, backwards(plain, lengths + 2))):
        nn.init.constant_(turning.direction.bias, bias)
        source = turning.read(tokens, lengths)
        assert_near(*(x * source.mask[..., None] for x in (source.memory, expected)), 1e-12)


def test_generated_tokens_are_the_most_probable() -> None:
    model = network(1, mix=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    tokens, lengths = copies(4, 2, 7, torch.Generator().manual_seed(2))
    generated = model.generate(tokens, lengths, 9)
    assert generated.shape == (4, 9)
    assert len(generated.unique()) > 2
    assert torch.equal(model(tokens, lengths, generated).argmax(-1), generated)


def test_dropout_is_on_the_source() -> None:
    model = network(dropout=0.9)
    tokens, lengths = copies(4, 2, 7, torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    assert not torch.equal(model(tokens, lengths, tokens), model(tokens, lengths, tokens))
    model.eval()
    assert torch.equal(model(tokens, lengths, tokens), network().eval()(tokens, lengths, tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 0}, "vocab=0"),
        ({"hidden": 7}, "hidden=7 must be even"),
        ({"hidden": 0}, "hidden=0"),
        ({"embed": 0}, "embed=0"),
        ({"step": "none"}, "step='none'"),
        ({"mix_direction": "both"}, "mix_direction='both'"),
        ({"dropout": 1.5}, r"dropout=1\.5"),
    ],
)
def test_bad_networks(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        network(**options)


def test_bad_sources() -> None:
    model, tokens = network(), torch.ones(2, 5, dtype=torch.long)
    for bad in ((tokens, torch.tensor([5, 6])), (tokens, torch.tensor([5])), (tokens[0], torch.tensor([5]))):
        with pytest.raises(ShapeError, match=r"tokens must be \(B, S\) and lengths \(B,\) up to S; got"):
            model.read(*bad)
    with pytest.raises(OptionError, match="steps=0"):
        model.generate(tokens, torch.tensor([5, 5]), 0)


def copying_accuracy(model: MonotonicLocationSeq2Seq, length: int) -> float:
    """Return the share of tokens that the network copies right, step by step."""
    tokens, lengths = copies(100, length, length, torch.Generator().manual_seed(99))
    return (model.generate(tokens, lengths, length) == tokens).double().mean().item()


def trained_to_copy(content: bool, steps: int = 400, lr: float = 5e-3) -> MonotonicLocationSeq2Seq:
    """Train on strings of 5 to 10 tokens. `content`: the same network without the bell."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, random = (
            MonotonicLocationSeq2Seq(11, 64, embed=32, dropout=0.0, mix=content),
            torch.Generator().manual_seed(0),
        )
    if content:
        model.decoder.attention.w_gate.requires_grad_(False).zero_()
        model.decoder.attention.gate_bias.requires_grad_(False).fill_(-1e4)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(learned, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        tokens, lengths = copies(32, 5, 10, random)
        optimiser.zero_grad()
        F.cross_entropy(model(tokens, lengths, tokens).flatten(0, 1), tokens.flatten(), ignore_index=0).backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimiser.step()
        schedule.step()
    return model


@pytest.mark.slow
def test_it_copies_strings_three_times_as_long(claim) -> None:
    ours, content = (trained_to_copy(content) for content in (False, True))
    assert copying_accuracy(content, 10) > 0.9, "the baseline has learned its task"
    claim(
        "trained to copy 5 to 10 tokens, it copies 30: share of tokens right",
        ours=copying_accuracy(ours, 30), baseline=copying_accuracy(content, 30), better="higher", margin=0.3,
        baseline_name="attention over contents", seed=0,
    )  # fmt: skip
    assert copying_accuracy(ours, 30) >= 0.9
