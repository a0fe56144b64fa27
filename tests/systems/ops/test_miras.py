"""Miras: its choices equal the known memories at their limits, and robust objectives ignore outliers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.core.errors import DivergedError, OptionError, ShapeError
from foveate.ops.functional import inner_mlp
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from foveate.ops.memory.miras import Miras
from foveate.ops.memory.titans import Titans
from tests.systems.ops.recall import Model, Recall, accuracy, train
from tests.systems.ops.test_titans import delta_rule, recall, unit

SHAPE = (2, 2, 32, 16)


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    return unit(*SHAPE, seed=seed), unit(*SHAPE, seed=seed + 1), values


def same(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() < 1e-9


@pytest.mark.parametrize(("bias", "p"), [("lp", 1.5), ("lp", 3.0), ("huber", 3.0), ("huber_norm", 3.0)])
def test_a_zero_error_writes_nothing_and_has_gradients(bias, p):
    """Without smoothing, padding of the last chunk and exactly predicted values have `|e| = 0`."""
    q, k, v = (x[:, :, :13].requires_grad_() for x in tensors())
    op = Miras(bias, "l2", p=p, alpha=0.1, theta=0.1, delta=0.5, chunk=8, smooth=0.0)
    out, smoothed = op(q, k, v, causal=True), Miras(bias, "l2", p=p, alpha=0.1, theta=0.1, delta=0.5, chunk=8)
    assert (out - smoothed(q, k, v, causal=True)).abs().max() < 1e-3  # smoothing is small
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert not op(q, k, torch.zeros_like(v), causal=True).any()


@pytest.mark.parametrize("chunk", [1, 8])  # a gradient that does not depend on the weights is exact in any chunk
def test_dot_is_linear_attention(chunk):
    q, k, v = tensors()
    op = Miras("dot", "none", theta=1.0, chunk=chunk)
    same(op(q, k, v, causal=True), LightningAttention2([1.0, 1.0])(q, k, v, causal=True))
    fading = Miras("dot", "l2", alpha=0.1, theta=0.5, chunk=chunk)
    same(fading(q, k, v, causal=True), LightningAttention2([0.9, 0.9])(q, k, 0.5 * v, causal=True))


def test_l2_without_retention_is_the_delta_rule():
    q, k, v = tensors()
    same(Miras("l2", "none", theta=0.4, chunk=1)(q, k, v, causal=True), delta_rule(q, k, v, beta=0.4))


@pytest.mark.parametrize("chunk", [1, 8])
def test_l2_with_decay_and_momentum_is_titans_with_a_linear_memory(chunk):
    q, k, v = tensors()
    rates = {"alpha": 0.05, "eta": 0.6, "chunk": chunk}
    # Titans' loss has no 1/2
    theirs = Titans(2, 16, depth=1, theta=0.1, **rates).double()(q, k, v, causal=True)
    same(Miras("l2", "l2", theta=0.2, **rates)(q, k, v, causal=True), theirs)


@pytest.mark.parametrize("chunk", [1, 8])
def test_p_2_and_q_2_are_l2(chunk):
    q, k, v = tensors()
    rates = {"alpha": 0.05, "eta": 0.3, "chunk": chunk}
    plain = Miras("l2", "l2", theta=0.2, **rates)(q, k, v, causal=True)
    same(Miras("lp", "l2", p=2, theta=0.1, **rates)(q, k, v, causal=True), plain)  # nor has the l_p loss
    same(Miras("l2", "lq", q=2, theta=0.2, **rates)(q, k, v, causal=True), plain)
    same(Miras.moneta(p=2, q=2, theta=0.1, **rates, memory="linear")(q, k, v, causal=True), plain)


@pytest.mark.parametrize("bias", ["huber", "huber_norm", "huber_channel"])
def test_an_infinite_delta_is_l2_with_gradients(bias):
    q, k, v = (x.requires_grad_() for x in tensors())
    found = []
    for op in (Miras(bias, delta=math.inf), Miras("l2")):
        out = op(q, k, v, causal=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*found, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("bias", ["huber", "huber_norm", "huber_channel"])
def test_huber_steps_by_size_of_the_error(bias):
    q, k, v = tensors()
    k, v = k[:, :, :1], v[:, :, :1]
    delta = torch.tensor([[[0.1], [1e3]], [[0.1], [1e3]]], dtype=torch.float64)
    out = Miras.yaad(bias=bias, theta=1.0, smooth=0.0, memory="linear")(k, k, v, causal=True, delta=delta)
    far = {
        "huber": 0.1 * v.sign(),
        "huber_norm": 0.1 * F.normalize(v, dim=-1),
        "huber_channel": v.clamp(-0.1, 0.1),
    }
    same(out[:, 0], far[bias][:, 0])
    same(out[:, 1], v[:, 1])  # near: the error itself


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_the_slope_of_lp_is_that_of_the_loss(p):
    error = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad((error.abs() ** p).sum(), error)
    ours = Miras("lp", p=p)._slope(error, torch.zeros_like(error), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(ours, slope, rtol=1e-4, atol=1e-5)


def test_kl_is_the_multiplicative_update_on_a_simplex():
    q, k, v = tensors()
    op = Miras.memora(alpha=0.2, theta=0.7, mass=3.0, chunk=1, memory="linear")
    weights, out = torch.full((2, 2, 16, 16), 3.0 / 16, dtype=torch.float64), []
    for t in range(SHAPE[2]):
        error = torch.einsum("bhvk,bhk->bhv", weights, k[:, :, t]) - v[:, :, t]
        gradient = torch.einsum("bhv,bhk->bhvk", error, k[:, :, t])
        weights = 3.0 * (0.8 * torch.log(weights / 3.0) - 0.7 * gradient).softmax(-1)
        out.append(torch.einsum("bhvk,bhk->bhv", weights, q[:, :, t]))
    same(op(q, k, v, causal=True), torch.stack(out, 2))


def test_lq_is_the_normalized_sum_of_steps():
    q, k, v = tensors()
    weights, total, out = torch.zeros(2, 2, 16, 16, dtype=torch.float64), 0.0, []
    for t in range(SHAPE[2]):
        error = torch.einsum("bhvk,bhk->bhv", weights, k[:, :, t]) - v[:, :, t]
        total = 0.9 * total - 0.1 * torch.einsum("bhv,bhk->bhvk", error, k[:, :, t])
        norm = total.abs().pow(4).sum((-1, -2), keepdim=True).pow(1 / 4)
        weights = total / norm**2
        out.append(torch.einsum("bhvk,bhk->bhv", weights, q[:, :, t]))
    same(Miras("l2", "lq", q=4, alpha=0.1, theta=0.1, chunk=1)(q, k, v, causal=True), torch.stack(out, 2))


def trajectory(op: Miras, steps: int) -> list[Tensor]:
    """Return the weights after each of many random tokens, up to the first infinite ones if they diverge."""
    g = torch.Generator().manual_seed(0)
    state, found = op.init_state(1, 1, 1, 8, 8), []
    for _ in range(steps):
        q, k, v = (torch.randn(1, 1, 1, 8, generator=g) for _ in range(3))
        try:
            _, state = op.step(q, k, v, state)
        except DivergedError:
            return [*found, torch.full_like(found[-1], float("inf"))]
        found.append(op.link(state.memory[0]))
    return found


@pytest.mark.parametrize(("slices", "axes"), [("rows", -1), ("columns", -2), ("matrix", (-1, -2))])
def test_kl_weights_stay_on_the_simplex(slices, axes):
    for weights in trajectory(Miras.memora(theta=0.5, mass=2.0, slices=slices, chunk=1, memory="linear"), 1000)[::50]:
        assert (weights >= 0).all()
        assert (weights.sum(axes) - 2).abs().max() < 1e-5


def test_lq_bounds_weights_that_plain_descent_lets_grow(claim):
    steps = {"theta": 0.5, "chunk": 1}
    bounded = trajectory(Miras.moneta(p=3, q=4, **steps, memory="linear"), 1000)
    plain = trajectory(Miras("lp", "none", p=3, **steps), 1000)
    largest = [max(w.norm().nan_to_num(1e30, 1e30).item() for w in path) for path in (bounded, plain)]
    assert largest[1] > 10 * plain[0].norm()
    claim(
        "l_q retention bounds the weights: their largest norm over 1,000 random tokens over the first one, p = 3",
        ours=largest[0] / bounded[0].norm().item(), baseline=min(largest[1] / plain[0].norm().item(), 1e6),
        better="lower", margin=10, baseline_name="the same steps without retention", seed=0,
    )  # fmt: skip


def test_robust_objectives_pass_over_outliers(claim):
    g = torch.Generator().manual_seed(0)
    k = unit(32, 1, 16, 32, seed=0)
    v = torch.randn(32, 1, 16, 32, generator=g, dtype=torch.float64)
    bad = torch.rand(32, 1, 16, generator=g) < 0.2
    corrupted = torch.where(bad[..., None], 20 * v, v)
    steps = {"theta": 0.1, "chunk": 1}

    def error(op: Miras) -> float:
        read = recall(op, k, k.repeat(1, 1, 3, 1), corrupted.repeat(1, 1, 3, 1))
        return (read - v).square().mean(-1)[~bad].mean().item()

    l2, nothing = error(Miras("l2", "l2", **steps)), v.square().mean(-1)[~bad].mean().item()
    found = {
        "YAAD": Miras.yaad(5.0, **steps, memory="linear"),
        "Moneta with p = 1.5": Miras.moneta(1.5, **steps, memory="linear"),
    }
    for name, op in found.items():
        ours = error(op)
        assert ours < 0.7 * l2
        assert ours < nothing  # and it has learned something
        claim(
            f"{name} ignores outliers: squared error on clean associations if every fifth value is 20 times too large",
            ours=ours, baseline=l2, better="lower", baseline_name="the l2 objective, same steps", seed=0,
        )  # fmt: skip
    # p = 3 follows outliers: it recalls worse than p = 1.5, and without l_q retention it diverges
    assert error(Miras.moneta(3.0, **steps, memory="linear")) > error(found["Moneta with p = 1.5"])
    with pytest.raises(DivergedError, match="Miras's memory diverged"):
        error(Miras("lp", "l2", p=3.0, **steps))


def test_by_key_and_presets():
    q, k, v = tensors()
    for preset, options in (
        (Miras.moneta(memory="linear"), {"bias": "lp", "retention": "lq"}),
        (Miras.yaad(memory="linear"), {"bias": "huber", "retention": "l2"}),
        (Miras.memora(memory="linear"), {"bias": "l2", "retention": "kl"}),
    ):
        same(preset(q, k, v, causal=True), foveate.attend(q, k, v, "miras", causal=True, **options))
    different = [
        op(q, k, v, causal=True)
        for op in (Miras.moneta(memory="linear"), Miras.yaad(memory="linear"), Miras.memora(memory="linear"))
    ]
    assert all((a - b).abs().max() > 1e-2 for a, b in pairwise(different))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "l1"}, "bias='l1' must be one of 'dot', 'l2', 'lp', 'huber', 'huber_norm'"),
        ({"retention": "elastic"}, "retention='elastic' must be one of"),
        ({"p": 0.5}, "p=0.5 must be at least 1"),
        ({"delta": -1}, "delta=-1"),
        ({"retention": "none", "alpha": 0.1}, 'alpha=0.1 decays, and retention="none" does not'),
        ({"memory": "gru"}, "memory='gru' must be one of 'linear', 'mlp', 'plain_mlp'"),
        ({"memory": "mlp"}, 'memory="mlp" must come with heads and head_dim; got None and None'),
        ({"memory": "plain_mlp", "heads": 2}, "got 2 and None"),
        ({"memory": "mlp", "heads": 2, "head_dim": 4, "value_dim": 3}, "value_dim=3 must be head_dim=4"),
        ({"memory": "mlp", "heads": 0, "head_dim": 4}, "heads=0"),
        ({"memory": "plain_mlp", "heads": 2, "head_dim": 4, "value_dim": 0}, "value_dim=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        Miras(**options)


def test_a_call_of_another_size_is_refused():
    q = torch.zeros(1, 3, 5, 4, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"Miras was built for \(Hq, D, Dv\)=\(2, 4, 4\); got \(3, 4, 4\)"):
        mlp("l2")(q, q, q, causal=True)


def test_a_decay_brought_to_a_memory_without_one_is_refused():
    q, k, v = tensors()
    with pytest.raises(OptionError, match="takes no input 'alpha'"):
        Miras("l2", "none")(q, k, v, causal=True, alpha=torch.zeros(SHAPE[:3]))


# -- an MLP for a memory -----------------------------------------------------------------------------------------------


def mlp(*options: Any, **more: Any) -> Miras:
    """Make two heads of width 4, with random gain and shift."""
    sizes = {"memory": "mlp", "heads": 2, "head_dim": 4, "generator": torch.Generator().manual_seed(0)}
    op = Miras(*options, **{**sizes, **more}).double()
    if op.memory == "mlp":
        g = torch.Generator().manual_seed(1)
        for t in (op.gain, op.shift):
            t.data += 0.3 * torch.randn(t.shape, generator=g, dtype=t.dtype)
    return op


def learned(op: Miras, q: Tensor, k: Tensor, v: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Descend `loss(M(k) - v)` one sequence and head at a time, with gradients by autograd and the norm by torch."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def answer(head: int, weights: list[Tensor], x: Tensor) -> Tensor:
        if op.memory == "plain_mlp":
            return weights[1] @ F.silu(weights[0] @ x)
        y = F.layer_norm(weights[1] @ F.gelu(weights[0] @ x), (4,), op.gain[head, 0], op.shift[head, 0], 1e-5)
        return x + y

    out = torch.zeros_like(v)
    for b, h in itertools.product(range(v.shape[0]), range(v.shape[1])):
        kept = [matrix[h].detach() for matrix in op.first]
        for t in range(v.shape[2]):
            if t % op.chunk == 0:
                anchor = [op.link(m).detach().requires_grad_() for m in kept]
            gradients = torch.autograd.grad(loss(answer(h, anchor, k[b, h, t]) - v[b, h, t]), anchor)
            kept = [(1 - op.rates["alpha"]) * m - op.rates["theta"] * u for m, u in zip(kept, gradients, strict=True)]
            out[b, h, t] = answer(h, [op.link(m) for m in kept], q[b, h, t]).detach()
    return out


def small(n: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(2, 2, n, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(3)
    )
    return q, k, v


@pytest.mark.parametrize("memory", ["mlp", "plain_mlp"])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    ("bias", "retention", "loss"),
    [
        ("l2", "l2", lambda e: e.square().sum() / 2),
        ("lp", "lq", lambda e: (e.abs() ** 3).sum()),
        ("l2", "kl", lambda e: e.square().sum() / 2),
        ("huber_channel", "l2", lambda e: F.huber_loss(e, torch.zeros_like(e), reduction="sum", delta=0.8)),
    ],
)
def test_mlp_gradients_equal_autograd(memory, chunk, bias, retention, loss):
    op = mlp(bias, retention, alpha=0.1, theta=0.05, delta=0.8, chunk=chunk, smooth=0.0, memory=memory)
    q, k, v = small()
    expected = learned(op, q, k, v, loss)
    for engine in op.capabilities.engines:
        same(op(q, k, v, causal=True, engine=engine), expected)


@pytest.mark.parametrize("chunk", [1, 8])
def test_a_plain_mlp_with_momentum_is_titans(chunk):
    q, k, v = tensors()
    rates = {"alpha": 0.05, "eta": 0.6, "chunk": chunk}
    theirs = Titans(2, 16, depth=2, expansion=4, theta=0.1, **rates).double()
    ours = Miras("l2", "l2", theta=0.2, memory="plain_mlp", heads=2, head_dim=16, **rates).double()
    ours.first.load_state_dict(theirs.first.state_dict())
    same(ours(q, k, v, causal=True), theirs(q, k, v, causal=True))


def test_the_slopes_of_both_activations():
    for act in (inner_mlp.SILU, inner_mlp.GELU):
        z = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad(act.value(z).sum(), z)
        torch.testing.assert_close(act.slope(z), slope)


def test_first_weights_of_an_mlp_are_trained():
    op = mlp("huber", "l2", chunk=2)
    names = [name for name, _ in op.named_parameters()]
    assert sorted(names) == ["first.0", "first.1", "gain", "shift"]

    def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(op, dict(zip(names, given, strict=True)), (q, k, v), {"causal": True})

    wanted = [*(x[:1, :, :3] for x in small()), *op.parameters()]
    assert torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in wanted])


def test_first_weights():
    shapes = [tuple(m.shape) for m in mlp("l2", memory="plain_mlp", head_dim=3, value_dim=5).first]
    assert shapes == [(2, 12, 3), (2, 5, 12)]
    big = {"heads": 4, "head_dim": 25, "generator": torch.Generator().manual_seed(0)}

    def spread(**options: Any) -> list[float]:
        return [round(matrix.std().item(), 1) for matrix in Miras(**big, **options).first]

    # unit keys have a variance of 1 / D, raw ones of 1
    assert spread(memory="mlp") == [1.0, 1.0]
    assert spread(memory="mlp", unit=False) == [0.2, 1.0]
    assert spread(memory="plain_mlp") == [0.2, 0.0]
    assert not mlp("l2", memory="plain_mlp").first[1].any()
    one, other = (mlp("l2", generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(map(torch.equal, one.first, other.first))


def test_the_presets_are_the_papers():
    q, k, v = small()
    sizes = {"heads": 2, "head_dim": 4}
    for preset in (Miras.moneta, Miras.yaad, Miras.memora):
        made = [make(**sizes, generator=torch.Generator().manual_seed(0)).double() for make in (preset, preset)]
        assert made[0].memory == "mlp"
        assert made[0].first[0].shape == (2, 16, 4)
        assert made[0](q, k, v, causal=True).isfinite().all()
    assert (Miras.moneta(**sizes).p, Miras.moneta(**sizes).q, Miras.yaad(2.0, **sizes).rates["delta"]) == (
        3.0,
        4.0,
        2.0,
    )


def test_an_mlp_holds_more_pairs_than_it_has_channels(claim):
    k = unit(4, 1, 48, 16, seed=0)
    v = torch.randn(4, 1, 48, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = {}
    for memory in ("mlp", "linear"):
        g = torch.Generator().manual_seed(0)
        op = Miras("l2", "none", theta=0.1, chunk=1, memory=memory, heads=1, head_dim=16, generator=g).double()
        error[memory] = (recall(op, k, k.repeat(1, 1, 12, 1), v.repeat(1, 1, 12, 1)) - v).square().mean().item()
    claim(
        "an MLP memory stores more: squared error of 48 associations in 16 dimensions after 12 passes",
        ours=error["mlp"], baseline=error["linear"], better="lower", margin=0.2,
        baseline_name="a linear memory, same objective and step", seed=0,
    )  # fmt: skip


TWICE = Recall(tellings=2)


@pytest.mark.slow
def test_trained_end_to_end_it_recalls_the_latest_value(claim):
    found = {}
    for name, make, lr in (
        ("ours", lambda: Miras.yaad(bias="huber_norm", memory="linear"), 5e-3),
        ("linear", lambda: LightningAttention2([1.0, 1.0]), 1e-2),
    ):
        torch.manual_seed(0)  # each with the better of two learning rates
        found[name] = accuracy(train(Model([make(), make()]), TWICE, 300, lr=lr), TWICE)
    claim(
        "YAAD (huber_norm) recalls new values: share recalled of 8 keys given twice, two trained layers of width 64",
        ours=found["ours"], baseline=found["linear"], better="higher", margin=0.1,
        baseline_name="linear attention without gates", seed=0,
    )  # fmt: skip
