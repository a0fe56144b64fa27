"""The linear family: its three forms agree in outputs and gradients, and equal the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.bench.parts.memory import peak_bytes
from foveate.core.errors import ShapeError, UnsupportedEngine, UnsupportedPattern
from foveate.ops.base.linear import Linear
from foveate.ops.functional import linear_forms
from foveate.ops.linear.hedgehog import Hedgehog
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from foveate.ops.operator import Pattern

HEADS, DIM, VALUE = 4, 6, 5
CAUSAL: frozenset[Pattern] = frozenset({"causal self", "causal cross"})


@final
class Elu(Linear):
    """Features `elu + 1`, normalized, without decay."""

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return F.elu(q * scale) + 1

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return F.elu(k) + 1


@final
class Gated(Linear):
    """One data-dependent decay for each token and head, an input of the call."""

    capabilities = replace(Linear.capabilities, patterns=CAUSAL, inputs=frozenset({"gate"}))
    normalized: ClassVar[bool] = False
    block = 8

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return q * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return inputs["gate"]


@final
class GatedByFeature(Linear):
    """One data-dependent decay for each token, head and feature; normalized, so that the sum decays too."""

    capabilities = replace(Linear.capabilities, patterns=CAUSAL, inputs=frozenset({"gates"}))
    block = 12  # neither a power of 2 nor a multiple of the tile

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return F.softplus(q * scale)

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return F.softplus(k)

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return inputs["gates"]


@final
class FadingFeatures(Linear):
    """A fixed decay for each head and feature, one of them 1."""

    capabilities = replace(Linear.capabilities, patterns=CAUSAL)
    normalized: ClassVar[bool] = False

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return q * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        return -torch.linspace(0, 4, k.shape[1] * k.shape[3], dtype=k.dtype).view(k.shape[1], k.shape[3])


OPERATORS = {
    "elu": Elu,
    "gated": Gated,
    "gated by feature": GatedByFeature,
    "fading features": FadingFeatures,
    "lightning, tiled": lambda: LightningAttention2([1.0, 0.9, 0.2, 0.01], block=8),
    "lightning, autograd": lambda: LightningAttention2(block=8, backward="autograd"),
    "hedgehog": lambda: Hedgehog(HEADS, DIM).double(),
}
EVERY = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
CASES = [(name, pattern) for name, make in OPERATORS.items() for pattern in sorted(make().capabilities.patterns)]
PATTERNS = pytest.mark.parametrize(("name", "pattern"), CASES, ids=[", ".join(case) for case in CASES])


def inputs_of(
    op: Linear, n: int, n_queries: int | None = None, kv_heads: int = HEADS, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, HEADS, n_queries or n, DIM), (2, kv_heads, n, DIM), (2, kv_heads, n, VALUE))
    qkv = tuple(torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    extra = {
        name: F.logsigmoid(torch.randn(2, HEADS, n, *more, generator=g, dtype=torch.float64)).requires_grad_()
        for name, more in (("gate", ()), ("gates", (DIM,)))
    }
    return qkv, {name: extra[name] for name in op.capabilities.inputs}


def naive(op: Linear, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Tensor], causal: bool) -> Tensor:
    """Compute the output by the definition, pair by pair."""
    scale = op.capabilities.default_scale or q.shape[-1] ** -0.5
    fq, fk = op.query_features(q, scale), op.key_features(k, scale)
    decay = op.log_decay(k, **extra)
    factor = torch.ones(2, HEADS, k.shape[2], fk.shape[-1], dtype=torch.float64)
    if decay is not None:
        decay = decay[..., None] if decay.shape in ((HEADS,), (2, HEADS, k.shape[2])) else decay
        factor = torch.exp(decay if decay.dim() == 4 else decay[None, :, None]).expand_as(factor)
    out = torch.zeros(2, HEADS, q.shape[2], VALUE, dtype=torch.float64)
    for i in range(q.shape[2]):
        last = i + k.shape[2] - q.shape[2] if causal else k.shape[2] - 1
        total = torch.zeros(2, HEADS)
        for j in range(last + 1):
            faded = fk[:, :, j] * (factor[:, :, j + 1 : last + 1].prod(2) if causal else 1)
            w = (fq[:, :, i] * faded).sum(-1)
            out[:, :, i] += w[..., None] * v[:, :, j]
            total = total + w
        if op.normalized:
            out[:, :, i] /= total[..., None]
    return out


@PATTERNS
def test_reference_is_the_definition(name, pattern):
    op = OPERATORS[name]()
    (q, k, v), extra = inputs_of(op, 7, 4 if "cross" in pattern else None)
    causal = pattern.startswith("causal")
    with torch.no_grad():
        out = op(q, k, v, causal=causal, engine="reference", **extra)
        torch.testing.assert_close(out, naive(op, q, k, v, extra, causal), rtol=0, atol=1e-12)


@PATTERNS
@pytest.mark.parametrize(("n", "n_queries"), [(1, 1), (7, 5), (8, 8), (67, 63), (67, 1)])
def test_forms_agree_in_outputs_and_gradients(name, pattern, n, n_queries):
    op, causal = OPERATORS[name](), pattern.startswith("causal")
    n_queries = n_queries if "cross" in pattern else n
    (q, k, v), extra = inputs_of(op, n, n_queries, kv_heads=2)
    seen = torch.randn(2, HEADS, n_queries, VALUE, dtype=torch.float64)
    wanted = [q, k, v, *(x for x in extra.values() if causal), *op.parameters()]
    found = {}
    for engine in op.capabilities.engines:
        out = op(q, k, v, causal=causal, engine=engine, **extra)
        found[engine] = [out, *torch.autograd.grad((out * seen).sum(), wanted)]
    for engine in ("chunked", "recurrent"):
        for ours, reference in zip(found[engine], found["reference"], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@EVERY
def test_steps_are_the_causal_call(make):
    op = make()
    (q, k, v), extra = inputs_of(op, 11, kv_heads=2)
    state, out = op.init_state(2, HEADS, 2, DIM, VALUE, dtype=torch.float64), []
    for t in range(11):
        at = slice(t, t + 1)
        here = {name: x[:, :, at] for name, x in extra.items()}
        y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, **here)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 2), op(q, k, v, causal=True, **extra), rtol=1e-10, atol=1e-12)
    assert state.S.shape[-1] == VALUE
    assert (state.z is not None) == op.normalized


@PATTERNS
def test_output_is_weights_times_values(name, pattern):
    op, causal = OPERATORS[name](), pattern.startswith("causal")
    (q, k, v), extra = inputs_of(op, 9)
    weights = op.weights(q, k, causal=causal, **(extra if causal else {}))
    torch.testing.assert_close(weights @ v, op(q, k, v, causal=causal, **extra), rtol=1e-10, atol=1e-12)
    if op.normalized:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 9, dtype=torch.float64))


@EVERY
@pytest.mark.parametrize("engine", ["chunked", "recurrent", "reference"])
def test_masked_keys_are_as_if_absent_and_may_hold_nan(make, engine):
    op = make()
    (q, k, v), extra = inputs_of(op, 9)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[..., :3] = False  # a prefix, since masked positions count for a decay per head
    dirty = [x.detach().masked_fill(~mask[0, 0, 0, :, None], float("nan")).requires_grad_() for x in (k, v)]
    place = mask[0, 0, 0]
    gates = {
        n: x.detach().masked_fill(~(place if x.dim() == 3 else place[:, None]), float("nan")).requires_grad_()
        for n, x in extra.items()
    }
    out = op(q, *dirty, mask=mask, causal=True, engine=engine, **gates)
    clean = op(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], causal=True, **{n: x[:, :, 3:] for n, x in extra.items()})
    assert (out[:, :, :3] == 0).all()
    torch.testing.assert_close(out[:, :, 3:], clean, rtol=1e-10, atol=1e-12)
    for grad in torch.autograd.grad(out.sum(), [q, *dirty, *gates.values(), *op.parameters()]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("hole", [[4], [0, 3, 4, 8]])
def test_a_masked_position_decays_per_head_and_not_per_token(hole):
    mask = torch.ones(9, dtype=torch.bool)
    mask[hole] = False
    (q, k, v), extra = inputs_of(Gated(), 9)
    out = Gated()(q, k, v, mask=mask, causal=True, **extra)[:, :, mask]
    dropped = Gated()(q[:, :, mask], k[:, :, mask], v[:, :, mask], causal=True, gate=extra["gate"][:, :, mask])
    torch.testing.assert_close(out, dropped)
    fixed = LightningAttention2([0.5] * HEADS)
    lag = torch.arange(9)[:, None] - torch.arange(9)
    weights = (q @ k.transpose(-1, -2)) * torch.where((lag >= 0) & mask, 0.5**lag, 0.0)
    torch.testing.assert_close(fixed(q, k, v, mask=mask, causal=True), weights @ v)


@EVERY
def test_a_row_that_sees_nothing_is_zero(make):
    op = make()
    (q, k, v), extra = inputs_of(op, 5)
    out = op(q, k, v, mask=torch.zeros(1, 1, 1, 5, dtype=torch.bool), causal=True, **extra)
    assert (out == 0).all()


@EVERY
def test_grouped_heads_are_repeated_heads(make):
    op = make()
    (q, k, v), extra = inputs_of(op, 9, kv_heads=2)
    wide = op(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=True, **extra)
    torch.testing.assert_close(op(q, k, v, causal=True, **extra), wide, rtol=0, atol=0)


@EVERY
def test_batch_rows_are_independent(make):
    op = make()
    (q, k, v), extra = inputs_of(op, 20)
    both = op(q, k, v, causal=True, **extra)
    one = op(q[1:], k[1:], v[1:], causal=True, **{n: x[1:] for n, x in extra.items()})
    torch.testing.assert_close(both[1:], one, rtol=1e-12, atol=1e-12)


@EVERY
def test_half_precision_keeps_its_sums_in_float32(make):
    op = make().float()
    (q, k, v), extra = inputs_of(op, 300)
    half = {n: x.detach().bfloat16() for n, x in extra.items()}
    out = op(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True, **half)
    exact = op(*(x.bfloat16().double() for x in (q, k, v)), causal=True, **{n: x.double() for n, x in half.items()})
    assert out.dtype == torch.bfloat16
    # one rounding at the end, not three hundred before
    assert ((out.double() - exact).norm() / exact.norm()).item() < 3e-3


@EVERY
def test_the_future_is_not_seen(make):
    op = make()
    (q, k, v), extra = inputs_of(op, 20)
    before = op(q, k, v, causal=True, **extra)
    for x in (k, v, *extra.values()):
        x.data[:, :, 13:] -= 1.0
    after = op(q, k, v, causal=True, **extra)
    torch.testing.assert_close(before[:, :, :13], after[:, :, :13], rtol=0, atol=0)
    assert (before[:, :, 13:] - after[:, :, 13:]).abs().amax((0, 1, 3)).min() > 1e-6


@pytest.mark.parametrize("make", [Gated, GatedByFeature])
@pytest.mark.parametrize("engine", ["chunked", "recurrent", "reference"])
def test_a_gate_that_forgets_everything(make, engine):
    op = make()
    (q, k, v), extra = inputs_of(op, 20)
    ((name, given),) = extra.items()
    gate = given.detach().clone()
    gate[:, :, 11] = -math.inf
    gate.requires_grad_()
    out = op(q, k, v, causal=True, engine=engine, **{name: gate})
    since = op(q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], causal=True, **{name: given[:, :, 11:]})
    torch.testing.assert_close(out[:, :, 11:], since)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v, gate)))


def test_strong_decay_over_a_long_chunk_in_float32():
    n = 256
    fq, fk, v = (torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    decay = torch.full((1, 1, n), math.log(0.01))
    out = linear_forms.chunked(fq, fk, v, decay, torch.zeros(1, 1, 4, 4), n)
    exact = linear_forms.matrix(fq.double(), fk.double(), True, decay.double()) @ v.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("block", [5, 64, 3000])
def test_spans_of_a_long_call_pass_on_their_state(features, block):
    n, g = 2 * linear_forms.SPAN + 77, torch.Generator().manual_seed(0)
    fq, fk, v = (torch.randn(1, 2, n, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    decay = F.logsigmoid(torch.randn(1, 2, n, *([3] if features else []), generator=g, dtype=torch.float64) + 4)
    decay.requires_grad_()
    state = torch.randn(1, 2, 3, 3, generator=g, dtype=torch.float64).requires_grad_()
    wanted = (fq, fk, v, decay, state)
    seen = torch.randn(1, 2, n, 3, generator=g, dtype=torch.float64)
    ours, theirs = linear_forms.chunked(*wanted, block), linear_forms.recurrent(*wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    pairs = zip(*(torch.autograd.grad((x * seen).sum(), wanted) for x in (ours, theirs)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_a_long_past_is_absorbed_without_losing_the_recent_tokens():
    n, g = 65536, torch.Generator().manual_seed(0)
    fk, v = (torch.randn(1, 1, n, 4, generator=g) for _ in range(2))
    decay = torch.full((1, 1, n, 1), -0.7)
    exact = linear_forms.absorb(fk[:, :, -200:].double(), v[:, :, -200:].double(), decay[:, :, -200:].double())
    torch.testing.assert_close(linear_forms.absorb(fk, v, decay).double(), exact, rtol=1e-5, atol=1e-5)


def test_by_feature_the_factors_of_few_pairs_are_written_out():
    n, f = 512, 16
    fq, fk = torch.randn(2, 1, n, f).unbind()
    bytes_made = peak_bytes(lambda: linear_forms.matrix(fq, fk, True, -torch.rand(1, n, f)), torch.device("cpu"))
    assert bytes_made < n * n * f * 4 / 3


def test_no_queries_and_no_keys():
    op = Elu()
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    assert (op(q, k, k) == 0).all()
    assert op(q[:, :, :0], k, k, causal=True).shape == (1, 2, 0, 4)


def test_cost_grows_with_the_length_and_the_matrix_with_its_square():
    op = Elu()

    def flops(n, engine):
        q = torch.empty(1, 1, n, 16, device="meta")
        return op.plan(q, q, q, causal=True, engine=engine).flops

    assert flops(4096, "auto") == 4 * flops(1024, "auto")
    assert flops(4096, "reference") == 16 * flops(1024, "reference")
    assert flops(4096, "auto") < flops(4096, "reference") / 10


def test_refusals():
    op, q = Elu(), torch.randn(1, 2, 6, 4)
    with pytest.raises(UnsupportedEngine, match=r'engine="fused" cannot run Elu; it runs on auto, chunked'):
        op(q, q, q, engine="fused")
    with pytest.raises(UnsupportedPattern, match='mask of kind "pairs"'):
        op(q, q, q, mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(UnsupportedPattern, match='mask of kind "bias"'):
        op(q, q, q, mask=torch.zeros(1, 6))
    with pytest.raises(ShapeError, match=r"log decays of Gated must be .* got \(6,\)"):
        Gated()(q, q, q, causal=True, gate=torch.zeros(6))


@pytest.mark.parametrize("lead", [(), (2,), (2, 1, 3)])
@pytest.mark.parametrize("by_feature", [False, True, None])
def test_the_forms_take_any_leading_dims(lead: tuple[int, ...], by_feature: bool | None) -> None:
    """A head alone gives the same output as among others."""
    generator = torch.Generator().manual_seed(0)
    shapes = (*lead, 21, DIM), (*lead, 21, DIM), (*lead, 21, VALUE)
    fq, fk, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    decay = None
    if by_feature is not None:
        decay = -torch.rand(*lead, 21, *((DIM,) if by_feature else ()), generator=generator, dtype=torch.float64)
    state = torch.randn(*lead, DIM, VALUE, generator=generator, dtype=torch.float64)
    out = linear_forms.recurrent(fq, fk, v, decay, state)
    torch.testing.assert_close(linear_forms.chunked(fq, fk, v, decay, state, 4), out)
    empty = torch.zeros_like(state)
    torch.testing.assert_close(
        linear_forms.matrix(fq, fk, True, decay) @ v, linear_forms.recurrent(fq, fk, v, decay, empty)
    )
    written = empty
    for t in range(21):
        at = slice(t, t + 1)
        gate = None if decay is None else decay[..., at, :] if by_feature else decay[..., at]
        written = linear_forms.write(written, fk[..., at, :], v[..., at, :], gate)
    torch.testing.assert_close(linear_forms.absorb(fk, v, decay), written)


def test_a_state_separates_its_sums() -> None:
    q, k, v = (torch.randn(2, HEADS, 5, DIM, generator=torch.Generator().manual_seed(s)) for s in range(3))
    _, state = Elu().prefill(q, k, v)
    fk = F.elu(k) + 1
    torch.testing.assert_close(state.S, fk.mT @ v)
    torch.testing.assert_close(state.z, fk.sum(2))
    _, bare = LightningAttention2([1.0] * HEADS).prefill(q, k, v)
    assert bare.z is None
    torch.testing.assert_close(bare.S, k.mT @ v)


def test_the_plan_by_hand() -> None:
    """The plan counts q, k, v and the output once, and products in blocks and with the state, for Dv + 1 columns."""
    q, k, v = torch.zeros(2, HEADS, 100, DIM), torch.zeros(2, HEADS, 100, DIM), torch.zeros(2, HEADS, 100, VALUE)
    plan, inside, out = Elu().plan(q, k, v, causal=True), 64, VALUE + 1
    assert plan.bytes == 4 * 2 * HEADS * 100 * (2 * DIM + 2 * VALUE)
    assert plan.flops == 2 * HEADS * (2 * 100 * inside * (DIM + out) + 4 * 100 * DIM * out)
    assert plan.engine == "chunked"
    assert Elu().plan(q, k, v).flops == 2 * HEADS * 4 * 100 * DIM * out
