"""The dynamical systems framework: linear attention, S6, SSD and the qLSTM are instances of one recurrence."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import final

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.core import oracle
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import MultiHeadAttention
from foveate.ops.base.linear import Linear
from foveate.ops.dense.softmax import Softmax
from foveate.ops.functional import state_space
from foveate.ops.functional.state_space import StateSpace
from foveate.ops.linear.based import TaylorAttention
from foveate.ops.linear.dsf import NormalizedAttention, state_size, to_dsf
from foveate.ops.linear.hedgehog import Hedgehog
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from foveate.ops.memory.miras import Miras
from foveate.ops.operator import CAUSAL_PATTERNS
from tests.contracts.operators import CLASSES, example
from tests.support.tensors import assert_near
from tests.systems.ops.recall import Recall, accuracy, train
from tests.systems.ops.recall_layers import Elu, around

B, H, N, D, DV = 2, 3, 7, 4, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, H, N, D, seed=seed), draw(B, H, N, D, seed=seed + 1), draw(B, H, N, DV, seed=seed + 2)


def both_forms(system: StateSpace, u: Tensor) -> Tensor:
    out = system.run(u)
    assert_near(system.run(u, "dense"), out, 1e-12)
    return out


# -- the recurrence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", ["none", "one", "per token"])
def test_both_forms_are_the_recurrence(skip: str) -> None:
    s, i, o = 3, 2, 4
    decay, b, c = draw(B, N, s), draw(B, N, s, i, seed=1), draw(B, N, o, s, seed=2)
    d = {"none": None, "one": draw(o, i, seed=3), "per token": draw(B, N, o, i, seed=3)}[skip]
    u, expected = draw(B, N, i, seed=4), torch.zeros(B, N, o, dtype=torch.float64)
    decay[:, 3] = 0.0  # the state is forgotten
    for item in range(B):
        h = torch.zeros(s, dtype=torch.float64)
        for t in range(N):
            h = torch.diag(decay[item, t]) @ h + b[item, t] @ u[item, t]
            expected[item, t] = c[item, t] @ h
            if d is not None:
                expected[item, t] += (d if d.dim() == 2 else d[item, t]) @ u[item, t]
    system = StateSpace(decay, b, c, d)
    assert system.state_size == s
    assert_near(both_forms(system, u), expected, 1e-12)
    assert system.phi().shape == (B, N, o, N, i)


def test_phi_is_the_product_of_transitions() -> None:
    decay, b, c = draw(N, 3), draw(N, 3, 2, seed=1), draw(N, 4, 3, seed=2)
    phi = StateSpace(decay, b, c).phi()
    for i in range(N):
        for j in range(N):
            between = math.prod((torch.diag(decay[t]) for t in range(j + 1, i + 1)), start=torch.eye(3).double())
            expected = c[i] @ between @ b[j] if j <= i else torch.zeros(4, 2)
            assert_near(phi[i, :, j], expected, 1e-12)


def test_malformed_systems() -> None:
    decay, b, c = draw(N, 3), draw(N, 3, 2), draw(N, 4, 3)
    for wrong in ((decay, b[1:], c), (decay, b, c[..., 1:]), (decay[:, 1:], b, c)):
        with pytest.raises(ShapeError, match=r"Lambda, B, C must be"):
            StateSpace(*wrong)
    with pytest.raises(ShapeError, match=r"u must be \(..., N, I\) = \(..., 7, 2\)"):
        StateSpace(decay, b, c).run(draw(N, 3))
    with pytest.raises(OptionError, match="form='chunked' must be one of 'recurrent', 'dense'"):
        StateSpace(decay, b, c).run(draw(N, 2), "chunked")


# -- mixers in it, from random weights on tokens of 8 channels, 16 of them ---------------------------------------------

TOKENS, CHANNELS = 16, 8


def weight(rows: int, seed: int) -> Tensor:
    return draw(rows, CHANNELS, seed=seed) / math.sqrt(CHANNELS)


def tokens() -> Tensor:
    return draw(TOKENS, CHANNELS, seed=40)


@pytest.mark.parametrize("inside", [False, True])
def test_linear_attention(inside: bool) -> None:
    u, w_q, w_k, w_v = tokens(), weight(3, 1), weight(3, 2), weight(DV, 3)
    phi_q, phi_k = F.elu(u @ w_q.T) + 1, F.elu(u @ w_k.T) + 1
    eta = state_space.sum_of_weights(phi_q, phi_k)
    expected = torch.zeros(TOKENS, DV, dtype=torch.float64)
    for i in range(TOKENS):
        weights = torch.stack([phi_q[i] @ phi_k[j] for j in range(i + 1)])
        expected[i] = weights @ (u[: i + 1] @ w_v.T) / weights.sum()
    system = state_space.linear(phi_q, phi_k, w_v, eta=eta, inside=inside)
    assert system.state_size == 3 * DV
    assert_near(both_forms(system, u), expected, 1e-10)
    if inside:  # normalized linear attention is an SSD with this gate, whose keys are divided by eta
        gate = torch.cat([eta.new_ones(1), eta[:-1]]) / eta
        same = state_space.ssd(gate, phi_k / eta[:, None], phi_q, w_v)
        assert_near(both_forms(same, u), expected, 1e-10)
        assert_near(system.Lambda[1:], (eta[:-1] / eta[1:])[:, None].expand(-1, 3 * DV), 1e-12)
    else:
        assert (system.Lambda == 1).all()


def test_s6() -> None:
    u, size = tokens(), 3
    delta = F.softplus(u @ weight(CHANNELS, 1).T + 0.3)
    rates, b, c, skip = draw(CHANNELS, size).exp(), u @ weight(size, 2).T, u @ weight(size, 3).T, draw(CHANNELS, seed=4)
    expected = torch.zeros(TOKENS, CHANNELS, dtype=torch.float64)
    for e in range(CHANNELS):
        h = torch.zeros(size, dtype=torch.float64)
        for t in range(TOKENS):
            h = torch.exp(-delta[t, e] * rates[e]) * h + delta[t, e] * b[t] * u[t, e]
            expected[t, e] = c[t] @ h + skip[e] * u[t, e]
    system = state_space.s6(delta, rates, b, c, skip)
    assert system.state_size == CHANNELS * size
    assert_near(both_forms(system, u), expected, 1e-10)
    straight = both_forms(system, u) - both_forms(state_space.s6(delta, rates, b, c), u)
    assert_near(straight, skip * u, 1e-10)


@pytest.mark.parametrize("power", [None, 1.0, 2.5])
def test_qlstm(power: float | None) -> None:
    u = tokens()
    forget, write, read = (u @ weight(CHANNELS, seed).T for seed in (1, 2, 3))
    c, expected = torch.zeros(CHANNELS, dtype=torch.float64), []
    for t in range(TOKENS):
        f = torch.sigmoid(forget[t]) if power is None else torch.sigmoid(-forget[t]) ** power
        c = f * c + torch.sigmoid(write[t]) * u[t]
        expected.append(torch.sigmoid(read[t]) * c)
    system = state_space.qlstm(forget, write, read, power=power)
    assert system.state_size == CHANNELS
    assert_near(both_forms(system, u), torch.stack(expected), 1e-10)


def test_the_gate_of_s6_is_a_reversed_sigmoid() -> None:
    a = torch.linspace(-30, 30, 1001)
    assert (state_space.reversed_sigmoid(a) - torch.sigmoid(-a)).abs().max() < 1e-6
    assert_near(state_space.reversed_sigmoid(a.double(), 3.0), torch.sigmoid(-a.double()) ** 3, 1e-12)
    with pytest.raises(OptionError, match="power=-1"):
        state_space.reversed_sigmoid(a, -1)
    # a diagonal S6 with A = 1 is a qLSTM with that gate, where both write and read the same
    u, forget = tokens(), tokens() @ weight(CHANNELS, 1).T
    delta, ones = F.softplus(forget), torch.ones(TOKENS, 1, dtype=torch.float64)
    s6 = state_space.s6(delta, torch.ones(CHANNELS, 1, dtype=torch.float64), ones, ones)
    write = torch.logit(torch.full_like(forget, 0.5))
    lstm = state_space.qlstm(forget, write, write, power=1.0)  # writes u / 2 and reads c / 2
    assert_near(4 * lstm.run(delta * u), s6.run(u), 1e-6)


def test_taylor_states_approach_softmax_attention() -> None:
    q, k = (0.99 * F.normalize(draw(12, 4, seed=s), dim=-1) for s in (0, 1))
    v = draw(12, DV, seed=2)
    expected = oracle.attention(q[None, None], k[None, None], v[None, None], causal=True, scale=1.0)[0, 0]
    errors = []
    for order in range(7):
        system = state_space.softmax_taylor(q, k, DV, order, scale=1.0)
        assert system.state_size == DV * sum(4**p for p in range(order + 1))
        errors.append((both_forms(system, v) if order < 4 else system.run(v)).sub(expected).abs().max().item())
    assert all(later < before for before, later in pairwise(errors)), errors
    assert errors[6] < 1e-3
    # cut off at s² it weighs by 1 + s + s² / 2, with the usual scale
    half = state_space.softmax_taylor(q, k, DV, 2).run(v)
    s = (q @ k.T / 2).tril()
    weights = (1 + s + s**2 / 2).tril()
    assert_near(half, weights / weights.sum(-1, keepdim=True) @ v, 1e-12)


# -- any linear operator -----------------------------------------------------------------------------------------------


@final
class Gated(Linear):
    """Linear attention with a decay from the call: one for the whole state, or one for each feature."""

    capabilities = replace(Linear.capabilities, patterns=CAUSAL_PATTERNS, inputs=frozenset({"decay"}))
    normalized = False

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return q * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return inputs["decay"]


@final
class Faded(Linear):
    """Normalized linear attention with one constant decay per head."""

    capabilities = replace(Linear.capabilities, patterns=frozenset({"causal self"}))
    eps = 0.3

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return (q * scale).relu()

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k.relu()

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return -torch.arange(1, k.shape[1] + 1, dtype=k.dtype) / 5


GATES = {"per token": F.logsigmoid(draw(B, H, N)), "per feature": F.logsigmoid(draw(B, H, N, D, seed=9))}
CASES = {
    "linear": (lambda: LightningAttention2([1.0] * H), {}, "linear attention", D * DV),
    "one decay a head": (lambda: LightningAttention2([0.9, 0.5, 0.1]), {}, "SSD", D * DV),
    "normalized": (lambda: Hedgehog(H, D).double(), {}, "normalized linear attention", 2 * D * DV),
    "normalized, taylor": (TaylorAttention, {}, "normalized linear attention", (1 + D + D * D) * DV),
    "gated": (Gated, {"decay": GATES["per token"]}, "SSD", D * DV),
    "gated by feature": (Gated, {"decay": GATES["per feature"]}, "diagonal SSM", D * DV),
    "normalized and faded": (Faded, {}, "normalized SSD", D * DV),
    "a normalizer of its own": (
        NormalizedAttention, {"eta": draw(B, H, N, seed=7).exp()}, "normalized linear attention", D * DV,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_linear_operator_is_its_system(case: str, scale: float | None) -> None:
    make, inputs, equivalent, numbers = CASES[case]
    op, (q, k, v) = make(), qkv()
    found = to_dsf(op, q, k, v, scale=scale, **inputs)
    assert found.equivalent == equivalent
    assert found.state_size == found.system.state_size == numbers
    assert_near(found.u, v, 0)
    assert_near(both_forms(found.system, found.u), op(q, k, v, causal=True, scale=scale, **inputs), 1e-10)


def test_every_linear_operator_of_the_catalogue_converts() -> None:
    linear = [key for key, cls in CLASSES.items() if issubclass(cls, Linear)]
    assert len(linear) >= 4
    q, k, v = draw(B, 4, N, 8), draw(B, 2, N, 8, seed=1), draw(B, 2, N, 8, seed=2)
    for key in linear:
        op = example(key, N)
        if "causal self" not in op.capabilities.patterns:
            with pytest.raises(UnsupportedPattern, match=f'{op.name} does not define "causal self"'):
                to_dsf(op, q, k, v)
            continue
        found = to_dsf(op, q, k, v)
        assert_near(found.system.run(found.u), op(q, k, v, causal=True), 1e-9, key)
        sums = found.state_size // 8 if op.normalized else 0
        assert state_size(op, 8, 8, heads=4) >= found.state_size + sums


def test_equivalent_systems_coincide() -> None:
    q, k, v = qkv()
    gate = GATES["per token"].exp()
    predicted = state_space.ssd(gate, k, q, DV)
    assert_near(predicted.run(v), Gated()(q, k, v, causal=True, scale=1.0, decay=gate.log()), 1e-10)
    assert_near(predicted.Lambda, to_dsf(Gated(), q, k, v, decay=gate.log()).system.Lambda, 1e-12)
    # a diagonal gate on features is S6 with one input a channel, whose steps set the amount that is written
    by_feature = to_dsf(Gated(), q, k, v, scale=1.0, decay=GATES["per feature"])
    for channel in range(DV):
        delta = -GATES["per feature"].mean(-1, keepdim=True)
        rates = torch.ones(1, D, dtype=torch.float64)
        s6 = state_space.s6(delta, rates, k / delta, q)
        assert_near(s6.B.squeeze(-1), k, 1e-12)
        scalar = to_dsf(Gated(), q, k, v, scale=1.0, decay=-delta[..., 0])
        assert_near(s6.run(v[..., channel, None])[..., 0], scalar.system.run(v)[..., channel], 1e-10)
    assert not torch.allclose(by_feature.system.run(v), scalar.system.run(v))


def test_operators_without_a_linear_state_are_refused_by_name() -> None:
    q, k, v = qkv()
    for op in (Softmax(), Miras(), foveate.ops.SlidingWindow(3)):
        with pytest.raises(UnsupportedPattern, match=f"{op.name} has no linear state"):
            to_dsf(op, q, k, v)
    with pytest.raises(ShapeError, match="Nq=2, Nk=7"):
        to_dsf(LightningAttention2([0.5] * H), q[:, :, -2:], k, v)
    with pytest.raises(OptionError, match="takes no input 'gate'"):
        to_dsf(LightningAttention2([0.5] * H), q, k, v, gate=q)


def test_state_sizes() -> None:
    assert state_size(LightningAttention2([0.5, 0.5]), 8, DV, heads=2) == 8 * DV
    assert state_size(Hedgehog(2, 8), 8, DV, heads=2) == 16 * (DV + 1)
    assert state_size(TaylorAttention(), 16, 64) == 273 * 65
    assert state_size(TaylorAttention(symmetric=True), 16, 64) == 153 * 65
    assert state_size(Miras(), 8, DV) == 3 * 8 * DV  # the memory, its momentum and the anchor of its chunk
    assert state_size(Softmax(), 8, DV) is None


# -- normalized attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["identity", "elu1"])
def test_normalized_attention_by_hand(features: str) -> None:
    (q, k, v), eta = qkv(), draw(B, H, N, seed=5).exp()
    phi = {"identity": lambda x: x, "elu1": lambda x: torch.where(x > 0, x + 1, x.exp())}[features]
    expected = torch.einsum("bhid,bhjd->bhij", phi(q), phi(k)).tril() @ v / eta[..., None]
    op = NormalizedAttention(features)
    assert_near(op(q, k, v, causal=True, eta=eta), expected, 1e-12)
    assert_near(op(q, k, v, causal=True, eta=eta, scale=0.5), expected / 2, 1e-12)
    assert_near(op.weights(q, k, causal=True, eta=eta) @ v, expected, 1e-12)
    some = op(q[:, :, -3:], k, v, causal=True, eta=eta[:, :, -3:])
    assert_near(some, expected[:, :, -3:], 1e-12)
    state, out = op.init_state(B, H, H, D, DV, dtype=torch.float64), []
    for t in range(N):
        at = slice(t, t + 1)
        y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, eta=eta[:, :, at])
        out.append(y)
    assert_near(torch.cat(out, 2), expected, 1e-12)


@pytest.mark.parametrize("activation", ["exp", "softplus", "sigmoid"])
def test_a_normalizer_learned_from_the_queries(activation: str) -> None:
    q, k, v = qkv()
    op = NormalizedAttention(activation=activation, learned=(H, D)).double()
    at_first = {"exp": 1.0, "softplus": math.log(2), "sigmoid": 0.5}[activation]
    assert_near(op.normalizer(q), torch.full((B, H, N), at_first, dtype=torch.float64), 1e-12)
    op.weight.data, op.bias.data = draw(H, D, seed=6), draw(H, seed=7)
    act = {"exp": torch.exp, "softplus": lambda x: (1 + x.exp()).log(), "sigmoid": lambda x: 1 / (1 + (-x).exp())}
    eta = torch.stack([act[activation](q[:, h] @ op.weight[h] + op.bias[h]) for h in range(H)], 1)
    assert_near(op(q, k, v, causal=True), op(q, k, v, causal=True, eta=eta), 1e-12)
    assert op.capabilities.gates == {}


@pytest.mark.parametrize("activation", ["exp", "softplus", "sigmoid"])
def test_a_layer_makes_the_normalizer_from_its_tokens(activation: str) -> None:
    layer = MultiHeadAttention(12, 3, op=NormalizedAttention(activation=activation)).double()
    assert layer.rates["eta"].out_features == 3
    x = draw(2, N, 12)
    act = {"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid}[activation]
    eta = act(layer.rates["eta"](x)).transpose(1, 2)
    heads = (w(x).unflatten(-1, (3, 4)).transpose(1, 2) for w in (layer.q, layer.k, layer.v))
    mixed = layer.op(*heads, causal=True, eta=eta).transpose(1, 2).flatten(2)
    assert_near(layer(x, causal=True), layer.out(mixed), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "relu"}, "features='relu' must be one of 'identity', 'elu1'"),
        ({"activation": "relu"}, "activation='relu' must be one of 'exp', 'softplus', 'sigmoid'"),
        ({"learned": (0, 4)}, "learned heads=0"),
        ({"learned": (2, -1)}, "learned head_dim=-1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        NormalizedAttention(**options)


def test_bad_calls() -> None:
    q, k, v = qkv()
    with pytest.raises(OptionError, match=r"a call needs eta \(B, Hq, Nq\)"):
        foveate.attend(q, k, v, "dsf", causal=True)
    with pytest.raises(ShapeError, match=r"eta must be a tensor \(B, Hq, Nq\)=\(2, 3, 7\); got \(2, 3, 6\)"):
        NormalizedAttention()(q, k, v, causal=True, eta=torch.ones(B, H, 6))
    with pytest.raises(ShapeError, match=r"learned=\(Hq, D\)=\(2, 4\); got \(3, 4\)"):
        NormalizedAttention(learned=(2, D))(q, k, v, causal=True)
    with pytest.raises(ShapeError, match=r"learned=\(Hq, D\)=\(3, 5\); got \(3, 4\)"):
        NormalizedAttention(learned=(H, 5))(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        NormalizedAttention()(q, k, v, eta=torch.ones(B, H, N))


@pytest.mark.slow
def test_a_normalizer_of_its_own_recalls_more_at_the_same_state(claim) -> None:
    # 8 pairs at width 64 do not discriminate: after 600 steps both recall all but 0.2 % of them. Dividing by the sum
    # of the weights harms recall here: no division (eta = 1) does as well as a learned eta
    task, found = Recall(pairs=12, length=48), {}
    for name, make in (("ours", lambda: NormalizedAttention("elu1")), ("classic", Elu)):
        found[name] = 0.0
        for seed in (2, 3, 4):
            torch.manual_seed(seed)
            model = around(make(), make(), dim=32)
            found[name] += accuracy(train(model, task, 300, seed=seed, lr=1e-2), task) / 3
    assert found["ours"] > 0.7
    claim(
        "a learned normalizer recalls more values: share recalled of 12 keys, two layers of width 32, three seeds",
        ours=found["ours"], baseline=found["classic"], better="higher", margin=0.1,
        baseline_name="linear attention with elu + 1 and the sum of the weights", seed=2,
    )  # fmt: skip
