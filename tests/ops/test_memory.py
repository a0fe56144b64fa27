"""The family of test-time learners: chunks, tokens and steps agree, and equal gradient descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import DivergedError, OptionError, ShapeError, UnsupportedEngine, UnsupportedPattern
from foveate.ops.base.test_time import Memory
from foveate.ops.functional.recurrence import linear_recurrence
from foveate.ops.memory.miras import Miras
from foveate.ops.memory.titans import Titans

HEADS, DIM, VALUE, LENGTH = 4, 6, 5, 11


def titans(**options: object) -> Titans:
    """Make a memory of any depth whose first weights all differ from zero."""
    g = torch.Generator().manual_seed(3)
    op = Titans(HEADS, DIM, VALUE, generator=g, **options)
    for matrix in op.first:
        matrix.data = torch.randn(matrix.shape, generator=g) * 0.3
    return op.double()


def miras_mlp(*options: str, **more: float) -> Miras:
    sizes = {"memory": "plain_mlp", "heads": HEADS, "head_dim": DIM, "value_dim": VALUE}
    op = Miras(*options, **sizes, **more, generator=torch.Generator().manual_seed(3))
    op.first[1].data += 0.3  # zeros would give no output
    return op.double()


OPERATORS = {
    "titans, linear": lambda chunk: titans(depth=1, chunk=chunk),
    "titans, two layers": lambda chunk: titans(depth=2, chunk=chunk),
    "titans, three layers": lambda chunk: titans(depth=3, expansion=1, chunk=chunk),
    "titans, raw keys": lambda chunk: titans(depth=2, chunk=chunk, unit=False, theta=0.01),
    "titans, gelu": lambda chunk: titans(depth=2, chunk=chunk, activation="gelu"),
    "titans, bounded gradients": lambda chunk: titans(depth=2, chunk=chunk, max_grad_norm=0.3),
    "titans, read by chunks": lambda chunk: titans(depth=2, chunk=chunk, reads="chunk"),
    "titans, linear, read by chunks": lambda chunk: titans(depth=1, chunk=chunk, reads="chunk"),
    "miras, yaad": lambda chunk: Miras.yaad(chunk=chunk, memory="linear"),
    "miras, moneta": lambda chunk: Miras.moneta(p=1.5, chunk=chunk, memory="linear"),
    "miras, memora": lambda chunk: Miras.memora(chunk=chunk, memory="linear"),
    "miras, dot": lambda chunk: Miras("dot", "l2", chunk=chunk),
    "miras, memora with an MLP": lambda chunk: miras_mlp("l2", "kl", chunk=chunk),
    "miras, moneta with an MLP": lambda chunk: miras_mlp("lp", "lq", p=1.5, chunk=chunk),
}
EVERY = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())


def inputs_of(op: Memory, n: int = LENGTH, n_queries: int | None = None, kv_heads: int = HEADS, seed: int = 0) -> tuple[
    tuple[Tensor, Tensor, Tensor], dict[str, Tensor]
]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, HEADS, n_queries or n, DIM), (2, kv_heads, n, DIM), (2, kv_heads, n, VALUE))
    qkv = tuple(torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    most = {"alpha": 0.4, "eta": 0.8, "theta": 0.3 if op.unit else 0.01, "delta": 2.0}  # long keys need short steps
    drawn = {
        name: most[name] * torch.rand(2, HEADS, n, generator=g, dtype=torch.float64)
        for name in sorted(op.capabilities.inputs)
    }
    return qkv, {name: rate.requires_grad_() for name, rate in drawn.items()}


def naive(
    op: Titans, q: Tensor, k: Tensor, v: Tensor, rates: dict[str, Tensor], act=F.silu, most: float = float("inf")
) -> Tensor:
    """Run gradient descent with momentum on `|M(k) - v|²` by autograd, one sequence and head at a time.

    The weights after a query's token answer it, or those at the start of its chunk.
    """
    if op.unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def answer(weights: list[Tensor], x: Tensor) -> Tensor:
        for matrix in weights[:-1]:
            x = act(matrix @ x)
        return weights[-1] @ x

    out = torch.zeros(2, HEADS, k.shape[2], VALUE, dtype=torch.float64)
    for b in range(2):
        for h in range(HEADS):
            weights = [matrix[h].detach() for matrix in op.first]
            momentum = [torch.zeros_like(matrix) for matrix in weights]
            for t in range(k.shape[2]):
                if t % op.chunk == 0:
                    anchor = [matrix.clone().requires_grad_() for matrix in weights]
                loss = (answer(anchor, k[b, h, t]) - v[b, h, t]).square().sum()
                gradients = [g * min(1.0, most / g.norm().item()) for g in torch.autograd.grad(loss, anchor)]
                alpha, eta, theta = (rates[name][b, h, t] for name in ("alpha", "eta", "theta"))
                momentum = [eta * s - theta * u for s, u in zip(momentum, gradients, strict=True)]
                weights = [(1 - alpha) * w + s for w, s in zip(weights, momentum, strict=True)]
                out[b, h, t] = answer(weights if op.reads == "token" else anchor, q[b, h, t])
    return out.detach()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("reads", ["token", "chunk"])
def test_both_engines_are_gradient_descent_by_autograd(depth, chunk, reads):
    op = titans(depth=depth, chunk=chunk, reads=reads)
    (q, k, v), rates = inputs_of(op)
    exact = naive(op, *(x.detach() for x in (q, k, v)), {n: x.detach() for n, x in rates.items()})
    for engine in op.capabilities.engines:
        torch.testing.assert_close(op(q, k, v, causal=True, engine=engine, **rates), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(("options", "extra"), [
    ({"activation": "gelu"}, {"act": F.gelu}), ({"max_grad_norm": 0.3}, {"most": 0.3}),
    ({"max_grad_norm": 1e6}, {}),
])  # fmt: skip
def test_the_activation_and_the_bound_on_gradients_by_autograd(chunk, options, extra):
    op = titans(depth=2, chunk=chunk, **options)
    (q, k, v), rates = inputs_of(op)
    given = *(x.detach() for x in (q, k, v)), {n: x.detach() for n, x in rates.items()}
    exact = naive(op, *given, **extra)
    for engine in op.capabilities.engines:
        torch.testing.assert_close(op(q, k, v, causal=True, engine=engine, **rates), exact, rtol=1e-10, atol=1e-12)
    if extra:
        assert (naive(op, *given) - exact).abs().max() > 1e-3


def loud(op: Memory, most: float | None) -> tuple[Memory, tuple[Tensor, Tensor, Tensor]]:
    """Make values and raw keys of size 10 in float32: every objective that grows with the error then diverges."""
    g = torch.Generator().manual_seed(0)
    op.max_grad_norm, op.unit = most, False
    return op.float(), tuple(10 * torch.randn(1, HEADS, 200, DIM, generator=g) for _ in range(3))


def by_steps(op: Memory, q: Tensor, k: Tensor, v: Tensor) -> None:
    state = op.init_state(1, HEADS, HEADS, DIM, DIM)
    for t in range(q.shape[2]):
        _, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)


LOUD = {
    "titans": lambda **more: Titans(HEADS, DIM, theta=0.5, generator=torch.Generator().manual_seed(0), **more),
    "miras": lambda **more: Miras("l2", "l2", theta=0.5, **more),
    "moneta": lambda **more: Miras.moneta(
        heads=HEADS, head_dim=DIM, theta=0.5, generator=torch.Generator().manual_seed(0), **more
    ),
}


@pytest.mark.parametrize("name", ["titans", "miras"])
@pytest.mark.parametrize("engine", ["chunked", "recurrent", "step"])
def test_a_diverging_memory_raises(name, engine):
    op, (q, k, v) = loud(LOUD[name](), None)
    with pytest.raises(
        DivergedError, match=r"(Titans|Miras)'s memory diverged: .*max_grad_norm=1.0, or a smaller"
    ) as e:
        by_steps(op, q, k, v) if engine == "step" else op(q, k, v, causal=True, engine=engine)
    assert "\n" not in str(e.value)
    k[:, :, 100:] = float("nan")  # inputs that are not finite are no divergence
    assert not op(q, k, v, causal=True, theta=torch.full((1, HEADS, 200), 1e-6)).isfinite().all()


@pytest.mark.parametrize("name", LOUD)
@pytest.mark.parametrize("engine", ["chunked", "recurrent"])
def test_bounded_gradients_keep_a_memory_finite(name, engine):
    op, given = loud(LOUD[name](), 1.0)
    assert op(*given, causal=True, engine=engine).isfinite().all()
    _, state = op.prefill(*given)
    for momentum in state.momentum:
        assert momentum.flatten(2).norm(dim=-1).max() < 0.5 / (1 - op.rates["eta"]) * (1 + 1e-5)


def test_a_bound_on_gradients_is_at_least_zero():
    with pytest.raises(OptionError, match="max_grad_norm=-1.0 must be at least 0"):
        Titans(HEADS, DIM, max_grad_norm=-1.0)


@EVERY
@pytest.mark.parametrize("chunk", [1, 2, 4, 16])
@pytest.mark.parametrize("n_queries", [LENGTH, 5, 1])
def test_engines_agree_in_outputs_and_gradients(make, chunk, n_queries):
    op = make(chunk)
    (q, k, v), rates = inputs_of(op, n_queries=n_queries, kv_heads=2)
    seen = torch.randn(2, HEADS, n_queries, VALUE, dtype=torch.float64)
    found = {}
    for engine in op.capabilities.engines:
        out = op(q, k, v, causal=True, engine=engine, **rates)
        wanted = [q, k, v, *rates.values(), *op.parameters()]
        found[engine] = [out, *torch.autograd.grad((out * seen).sum(), wanted, allow_unused=True)]
    for ours, reference in zip(found["chunked"], found["recurrent"], strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-10)


@EVERY
@pytest.mark.parametrize("chunk", [1, 4])
def test_steps_are_the_causal_call(make, chunk):
    op = make(chunk)
    (q, k, v), rates = inputs_of(op, kv_heads=2)
    state, out = op.init_state(2, HEADS, 2, DIM, VALUE, dtype=torch.float64), []
    for t in range(LENGTH):
        at = slice(t, t + 1)
        here = {name: x[:, :, at] for name, x in rates.items()}
        y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, **here)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 2), op(q, k, v, causal=True, **rates), rtol=1e-9, atol=1e-11)
    assert state.place == LENGTH % chunk


@EVERY
def test_rates_may_be_numbers_or_tensors(make):
    op = make(4)
    (q, k, v), _ = inputs_of(op)
    same = {
        name: torch.full((2, HEADS, LENGTH), op.rates[name], dtype=torch.float64) for name in op.capabilities.inputs
    }
    torch.testing.assert_close(op(q, k, v, causal=True), op(q, k, v, causal=True, **same))


@EVERY
def test_the_scale_is_a_factor_on_queries_as_they_enter(make):
    op = make(4)
    (q, k, v), rates = inputs_of(op)
    doubled = op(q, k, v, causal=True, scale=2.0, **rates)
    if op.unit:  # unit length already: a longer query would be normalized again
        torch.testing.assert_close(op(2 * q, k, v, causal=True, **rates), op(q, k, v, causal=True, **rates))
    else:
        torch.testing.assert_close(doubled, op(2 * q, k, v, causal=True, **rates))
    assert (doubled - op(q, k, v, causal=True, **rates)).abs().max() > 1e-3
    if not op.linked and len(op.initial(HEADS, DIM, VALUE, q)) == 1:  # a matrix answers linearly
        torch.testing.assert_close(doubled, 2 * op(q, k, v, causal=True, **rates))


@pytest.mark.parametrize("cls", [Titans, Miras])
def test_a_layer_begins_with_small_rates(cls):
    """For a zero token, most of a memory is left after 128 tokens, momentum decays fast, and steps are short."""
    begun = {
        name: torch.sigmoid(torch.tensor(cls.capabilities.gates[name].bias)).item()
        for name in ("alpha", "eta", "theta")
    }
    assert (1 - begun["alpha"]) ** 128 > 0.7
    assert 0.05 < begun["eta"] < 0.2
    assert 0 < begun["theta"] < 0.01


@EVERY
@pytest.mark.parametrize("engine", ["chunked", "recurrent"])
def test_masked_tokens_are_not_written_and_may_hold_nan(make, engine):
    op = make(1)
    (q, k, v), rates = inputs_of(op)
    mask = torch.ones(LENGTH, dtype=torch.bool)
    mask[[0, 4, 5, 9]] = False
    dirty = [x.detach().masked_fill(~mask[:, None], float("nan")).requires_grad_() for x in (k, v)]
    gates = {n: x.detach().masked_fill(~mask, float("nan")).requires_grad_() for n, x in rates.items()}
    out = op(q, *dirty, mask=mask, causal=True, engine=engine, **gates)
    clean = op(*(x[:, :, mask] for x in (q, k, v)), causal=True, **{n: x[:, :, mask] for n, x in rates.items()})
    torch.testing.assert_close(out[:, :, mask], clean, rtol=1e-10, atol=1e-12)
    wanted = [q, *dirty, *gates.values(), *op.parameters()]
    for grad in torch.autograd.grad(out.sum(), wanted, allow_unused=True):
        assert grad is None or grad.isfinite().all()


def test_masked_tokens_leave_chunks_as_they_are():
    op = titans(depth=2, chunk=4)
    (q, k, v), rates = inputs_of(op)
    mask = torch.ones(LENGTH, dtype=torch.bool)
    mask[[1, 6]] = False
    found = [op(q, k, v, mask=mask, causal=True, engine=engine, **rates) for engine in op.capabilities.engines]
    torch.testing.assert_close(*found)


@EVERY
def test_grouped_heads_are_repeated_heads(make):
    op = make(4)
    (q, k, v), rates = inputs_of(op, kv_heads=2)
    few = {name: x[:, ::2] for name, x in rates.items()}
    wide = {name: x.repeat_interleave(2, 1) for name, x in few.items()}
    repeated = op(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=True, **wide)
    torch.testing.assert_close(op(q, k, v, causal=True, **few), repeated, rtol=0, atol=0)


@EVERY
def test_batch_rows_are_independent_and_the_future_is_hidden(make):
    op = make(4)
    (q, k, v), rates = inputs_of(op)
    before = op(q, k, v, causal=True, **rates)
    one = op(q[1:], k[1:], v[1:], causal=True, **{n: x[1:] for n, x in rates.items()})
    torch.testing.assert_close(before[1:], one, rtol=1e-12, atol=1e-12)
    for x in (k, v, *rates.values()):
        x.data[:, :, 6:] *= 0.5
    after = op(q, k, v, causal=True, **rates)
    seen = 6 if op.reads == "token" else 8  # the first position that sees the change: its token, or the next chunk
    torch.testing.assert_close(before[:, :, :seen], after[:, :, :seen], rtol=0, atol=0)
    assert (before[:, :, seen:] - after[:, :, seen:]).abs().amax((0, 1, 3)).min() > 1e-8


@EVERY
def test_half_precision_learns_in_float32(make):
    op = make(4).float()
    (q, k, v), _ = inputs_of(op, 200)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    exact = op.double()(*(x.double() for x in half), causal=True)
    out = op.float()(*half, causal=True)
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).norm() / exact.norm()).item() < 3e-3


def test_gradcheck_through_the_inner_steps():
    op = titans(depth=2, chunk=2)
    (q, k, v), rates = inputs_of(op, 4)
    q, k, v = (x[:1, :, :3].detach().requires_grad_() for x in (q, k, v))
    rates = {n: x[:1, :, :3].detach().requires_grad_() for n, x in rates.items()}

    def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        return op(q, k, v, causal=True, **dict(zip(rates, given, strict=True)))

    assert torch.autograd.gradcheck(run, (q, k, v, *rates.values()))


def test_an_empty_memory_answers_zero():
    op = Titans(2, 4)
    q = torch.randn(1, 2, 5, 4)
    assert (op(q, q, q, causal=True, mask=torch.zeros(5, dtype=torch.bool)) == 0).all()
    assert op(q[:, :, :0], q, q, causal=True).shape == (1, 2, 0, 4)


@EVERY
def test_before_anything_is_seen_the_answer_is_zero(make):
    op = make(4)
    (q, k, v), rates = inputs_of(op)
    mask = torch.arange(LENGTH) >= 2
    mask[6] = False
    for engine in op.capabilities.engines:
        out = op(q, k, v, mask=mask, causal=True, engine=engine, **rates)
        assert not out[:, :, :2].any()
        assert (out[:, :, 2:].abs().amax((0, 1, 3)) > 0).all()


@EVERY
@pytest.mark.parametrize("at", [0, 4, 6])
def test_continuing_equals_the_whole_call(make, at):
    op = make(4)
    (q, k, v), rates = inputs_of(op, kv_heads=2)
    mask = torch.arange(LENGTH) != (at or 1)
    whole = op(q, k, v, mask=mask, causal=True, **rates)
    state = op.init_state(2, HEADS, 2, DIM, VALUE, dtype=torch.float64)
    for part in (slice(0, at), slice(at, LENGTH)):
        given = {name: x[:, :, part] for name, x in rates.items()}
        out, state = op.go_on(*(x[:, :, part] for x in (q, k, v)), state, mask=mask[part], **given)
        torch.testing.assert_close(out, whole[:, :, part], rtol=1e-9, atol=1e-11)


@EVERY
def test_recalling_reads_and_writes_nothing(make):
    op = make(4)
    (q, k, v), rates = inputs_of(op)
    out, state = op.prefill(q, k, v, **rates)
    if op.reads == "chunk":  # a recall includes the write of the last token, which the token itself has not read
        op.reads = "token"
        out, _ = op.prefill(q, k, v, **rates)
    torch.testing.assert_close(op.recall(q[:, :, -1:], state), out[:, :, -1:], rtol=1e-9, atol=1e-11)
    assert op.recall(q.bfloat16(), state).dtype == torch.bfloat16


@pytest.mark.parametrize("zeros", [False, True])
def test_linear_recurrence_is_the_loop(zeros):
    g = torch.Generator().manual_seed(0)
    factors = torch.rand(2, 9, generator=g, dtype=torch.float64)
    if zeros:
        factors[:, [0, 4, 5]] = 0.0
    factors.requires_grad_()
    x, y = torch.randn(2, 9, 3, generator=g, dtype=torch.float64), torch.randn(2, 3, generator=g, dtype=torch.float64)
    found, expected = linear_recurrence(factors, x, y), []
    for t in range(9):
        y = factors[:, t, None] * y + x[:, t]
        expected.append(y)
    torch.testing.assert_close(found, torch.stack(expected, 1))
    ours, theirs = (torch.autograd.grad(z.square().sum(), factors)[0] for z in (found, torch.stack(expected, 1)))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(linear_recurrence(factors, x), linear_recurrence(factors, x, torch.zeros(2, 3).double()))


def test_cost_grows_with_the_length():
    op = Titans(1, 16)
    plans = [op.plan(*[torch.empty(1, 1, n, 16, device="meta")] * 3, causal=True) for n in (128, 512)]
    assert plans[1].flops == 4 * plans[0].flops
    assert plans[0].engine == "chunked"
    # weights that are materialised for each token cost more than those that stay products
    q = torch.empty(1, 1, 64, 16, device="meta")
    assert Miras.memora(memory="linear").plan(q, q, q, causal=True).flops > 2 * Miras().plan(q, q, q, causal=True).flops


def test_refusals():
    op, q = Titans(2, 4), torch.randn(1, 2, 6, 4)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        op(q, q, q)
    with pytest.raises(UnsupportedPattern, match="no matrix of weights"):
        op.weights(q, q, causal=True)
    with pytest.raises(UnsupportedEngine, match="cannot run Titans; it runs on auto, chunked, recurrent"):
        op(q, q, q, causal=True, engine="fused")
    with pytest.raises(ShapeError, match=r"theta must be a tensor \(B, H, Nk\)=\(1, 2, 6\); got \(6,\)"):
        op(q, q, q, causal=True, theta=torch.zeros(6))
    with pytest.raises(OptionError, match="takes no input 'beta'"):
        op(q, q, q, causal=True, beta=torch.zeros(1, 2, 6))
    with pytest.raises(OptionError, match="chunk=0"):
        Titans(2, 4, chunk=0)
    with pytest.raises(OptionError, match="alpha=1.5"):
        Titans(2, 4, alpha=1.5)
    with pytest.raises(OptionError, match="reads='segment' must be one of 'token', 'chunk'"):
        Titans(2, 4, reads="segment")
