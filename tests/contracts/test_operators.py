"""The contract that every operator of the catalogue has to keep."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from foveate.core import masks, oracle
from foveate.core.engines import ENGINES
from foveate.core.errors import UnsupportedEngine, UnsupportedPattern
from foveate.ops import Operator, SlidingWindow, Softmax
from tests.contracts.operators import (
    CLASSES,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LENGTHS,
    WIDTH,
    Call,
    a_mask,
    each_call,
    each_causal_engine,
    each_engine,
    each_operator,
    each_pattern,
    exact,
    example,
    main_call,
    on_flex,
    twin,
)  # fmt: skip
from tests.support.tensors import assert_near, gradients, qkv


def grouped(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, 1)


# -- the output --------------------------------------------------------------------------------------------------------


@each_engine(at_limit=True)
def test_at_the_exact_limit_it_is_softmax_attention(call: Call) -> None:
    q, k, v = call.tensors()
    op = exact(call.key, call.lengths[1])
    scale = WIDTH**-0.5 if op.capabilities.default_scale is None else op.capabilities.default_scale
    assert_near(call(op, q, k, v), oracle.attention(q, k, v, mask=call.mask, causal=call.causal, scale=scale), 1e-10)


@each_call()
def test_the_output_is_weights_times_values(call: Call) -> None:
    q, k, v = call.tensors()
    op = example(call.key)
    if not op.capabilities.has_weights:
        with pytest.raises(UnsupportedPattern, match=f"{op.name} has no matrix of weights"):
            op.weights(q, k, mask=call.mask, causal=call.causal)
        return
    weights = op.weights(q, k, mask=call.mask, causal=call.causal)
    assert weights.shape == (2, HEADS, *call.lengths)
    assert_near(call(op, q, k, v), weights @ grouped(op.values(v)), 1e-10)
    if call.causal:
        assert not weights[..., ~masks.causal(*call.lengths)].any()
    if call.mask is not None:
        assert not weights[~masks.allowed(call.mask).expand(weights.shape)].any()


@each_operator(lambda cls: cls.capabilities.has_weights and any("cross" in name for name in cls.capabilities.patterns))
def test_no_query_has_an_empty_matrix_of_weights(key: str) -> None:
    op = example(key)
    q, k, _ = qkv(0, 12, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    weights = op.weights(q, k, causal="cross" not in op.capabilities.patterns)
    assert weights.shape == (2, HEADS, 0, 12)
    assert weights.dtype == q.dtype


@each_engine(at_limit=False)
def test_engines_agree_in_outputs_and_gradients(call: Call) -> None:
    q, k, v = call.tensors(grad=True)
    op = example(call.key)
    wanted = [q, k, v, *op.parameters()]
    ours, theirs = call(op, q, k, v), call(op, q, k, v, engine=twin(call.key))
    assert_near(ours, theirs, 1e-10)
    for one, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert_near(one, other, 1e-9)


@pytest.mark.slow
@on_flex()
def test_compiled_flex_agrees(call: Call) -> None:
    q, k, v = call.tensors(dtype=torch.float32)
    op = example(call.key).float()
    assert_near(call(op, q, k, v), call(op, q, k, v, engine="reference"), 1e-5)


@each_operator()
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), kv_heads=st.integers(1, 2), width=st.sampled_from((2, 4, 8)),
    n_queries=st.integers(1, 17), extra=st.integers(0, 9), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(
    key: str, batch: int, groups: int, kv_heads: int, width: int, n_queries: int, extra: int, seed: int
) -> None:
    q, k, v = qkv(
        n_queries, n_queries + extra, batch=batch, heads=groups * kv_heads, kv_heads=kv_heads, width=width, seed=seed
    )
    kind = "cross" if extra else "self"
    for pattern in sorted({kind, f"causal {kind}"} & CLASSES[key].capabilities.patterns):
        op = example(key, n_queries + extra, groups * kv_heads, width)
        out = op(q, k, v, causal=pattern.startswith("causal"))
        assert out.isfinite().all()
        assert_near(out, op(q, k, v, causal=pattern.startswith("causal"), engine=twin(key)), 1e-10)


# -- visibility --------------------------------------------------------------------------------------------------------


@each_pattern(causal=True)
def test_the_future_does_not_reach_back(call: Call) -> None:
    op = example(call.key)
    group = op.capabilities.selection_group
    at = (group or 1) * (call.lengths[0] // 2 // (group or 1))
    assert 0 < at, "the example's groups of queries are longer than half of its length"
    q, k, v = call.tensors(grad=True)
    out = call(op, q, k, v)[:, :, :at]
    firsts = at, at + call.shift, at + call.shift
    for grad, first in zip(gradients(out, [q, k, v]), firsts, strict=True):
        assert not grad[:, :, first:].any()
        assert grad[:, :, :first].any()
    if group is None:  # all queries choose together, but no weight is on a later key
        return
    changed = [x.detach().clone() for x in (q, k, v)]
    for x, other, first in zip(changed, call.tensors(seed=9), firsts, strict=True):
        x[:, :, first:] = 3 * other[:, :, first:]
    assert_near(call(op, *changed)[:, :, :at], out, 1e-12)


@each_causal_engine()
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_the_future_does_not_reach_back(call: Call, garbage: float) -> None:
    """Garbage in later queries, keys and values does not change an earlier output."""
    op = example(call.key)
    at = op.capabilities.selection_group * (call.lengths[0] // 2 // op.capabilities.selection_group)
    clean = call.tensors()
    dirty = with_garbage(clean, (at, at + call.shift, at + call.shift), garbage)
    assert_near(call(op, *dirty)[:, :, :at], call(op, *clean)[:, :, :at], 1e-12)


@each_operator(lambda cls: cls.capabilities.streaming == "exact")
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_a_stream_with_garbage_is_the_call_with_garbage(key: str, garbage: float) -> None:
    """A prompt and a stream with garbage give the clean outputs up to the garbage."""
    op, at = example(key), 7
    clean = qkv(12, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    dirty = with_garbage(clean, (at, at, at), garbage)
    expected = op(*clean, causal=True)[:, :, :at]
    assert_near(op.prefill(*dirty)[0][:, :, :at], expected, 1e-10)
    assert_near(stream(op, *dirty)[:, :, :at], expected, 1e-10)


def with_garbage(tensors: tuple[torch.Tensor, ...], firsts: tuple[int, ...], garbage: float) -> list[torch.Tensor]:
    """Fill tensors with garbage of both signs from some position on."""
    found = [x.clone() for x in tensors]
    for x, first in zip(found, firsts, strict=True):
        x[:, :, first:] = garbage
        x[:, :, first + 1 :, ::2] = -garbage
    return found


@each_call(masked=True)
def test_masked_keys_have_no_effect(call: Call) -> None:
    """Neither NaN nor another finite value behind a mask changes the output or a gradient."""
    op = example(call.key)
    results = []
    for garbage in (float("nan"), float("inf"), 7.0):
        q, k, v = call.tensors()
        k[:, :, HIDDEN[0]], v[:, :, HIDDEN[1]] = garbage, garbage
        k[:, :, HIDDEN[1], ::2], v[:, :, HIDDEN[0], ::2] = -garbage, garbage
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = call(op, *leaves)
        results.append((out, gradients(out, [*leaves, *op.parameters()])))
    for out, grads in results[:2]:
        assert_near(out, results[-1][0], 1e-12)
        for one, other in zip(grads, results[-1][1], strict=True):
            assert_near(one, other, 1e-12)
    _, dk, dv = results[0][1][:3]
    assert not dk[:, :, list(HIDDEN)].any()
    assert not dv[:, :, list(HIDDEN)].any()


@each_operator()
def test_without_queries_there_is_no_output(key: str) -> None:
    op = example(key)
    keys = 8 if {"cross", "causal cross"} & op.capabilities.patterns else 0
    q, k, v = qkv(0, keys, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    inputs = {
        name: op.example_input(name, 2, HEADS, 0 if name.endswith("_q") else keys) for name in op.capabilities.inputs
    }
    causal = "self" not in op.capabilities.patterns
    assert op(q, k, v, causal=causal, **inputs).shape == (2, HEADS, 0, WIDTH)
    assert op.plan(q, k, v, causal=causal).flops >= 0


@each_call(masked=True)
def test_a_query_that_sees_nothing_gives_zeros(call: Call) -> None:
    op = example(call.key)
    q, k, v = call.tensors(grad=True)
    nobody = call.mask.clone()
    nobody[0] = masks.NEG_INF if call.mask_kind == "bias" else False
    out = op(q, k, v, mask=nobody, causal=call.causal)
    assert not out[0].any()
    assert out[1].any()
    for grad in gradients(out, [q, k, v, *op.parameters()]):
        assert grad.isfinite().all()
    if call.mask_kind != "keys":
        assert not call(op, q, k, v)[:, :, call.lengths[0] // 2].any()


@each_operator(lambda cls: "keys" in cls.capabilities.masks)
def test_batch_items_are_independent(key: str) -> None:
    call = main_call(key)
    op, (q, k, v) = example(key), call.tensors()
    mask = a_mask("keys", *call.lengths)
    together = op(q, k, v, mask=mask, causal=call.causal)
    for i in range(2):
        alone = op(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask=mask[i : i + 1], causal=call.causal)
        assert_near(alone, together[i : i + 1], 1e-12)


@each_pattern()
def test_grouped_heads_are_repeated_heads(call: Call) -> None:
    op, (q, k, v) = example(call.key), call.tensors()
    assert_near(call(op, q, k, v), call(op, q, grouped(k), grouped(v)), 1e-12)


# -- gradients, numbers, state -----------------------------------------------------------------------------------------


@each_pattern()
def test_gradients(call: Call) -> None:
    n_queries, n_keys = (length // 2 for length in LENGTHS[call.pattern])
    q, k, v = qkv(n_queries, n_keys, batch=1, heads=2, kv_heads=1, width=4, grad=True)
    op = example(call.key, n_keys, heads=2, width=4)
    names, parameters = [*dict(op.named_parameters())], list(op.parameters())

    def run(q, k, v, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(op, given, (q, k, v), {"causal": call.causal})

    assert torch.autograd.gradcheck(run, (q, k, v, *parameters), nondet_tol=0)


@each_pattern()
def test_bfloat16(call: Call) -> None:
    op = example(call.key).bfloat16()
    q, k, v = call.tensors(dtype=torch.bfloat16)
    out = call(op, q, k, v)
    assert out.dtype == torch.bfloat16
    expected = call(copy.deepcopy(op).double(), q.double(), k.double(), v.double())
    assert_near(out, expected, 0.03)


def stream(op, q, k, v) -> torch.Tensor:
    state = op.init_state(q.shape[0], HEADS, KV_HEADS, WIDTH, v.shape[3], dtype=q.dtype)
    out = []
    for t in range(q.shape[2]):
        at = slice(t, t + 1)
        y, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state)
        out.append(y)
    return torch.cat(out, 2)


@each_operator(lambda cls: cls.capabilities.streaming == "exact")
def test_token_by_token_is_the_causal_call(key: str) -> None:
    q, k, v = qkv(12, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    op = example(key)
    assert_near(stream(op, q, k, v), op(q, k, v, causal=True), 1e-10)


@each_operator(lambda cls: cls.capabilities.streaming is not None and cls.exact(HEADS, WIDTH, 12) is not None)
def test_token_by_token_at_the_exact_limit(key: str) -> None:
    q, k, v = qkv(12, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    op = exact(key, 12)
    assert_near(stream(op, q, k, v), op(q, k, v, causal=True), 1e-10)


@each_operator()
def test_calls_are_deterministic(key: str) -> None:
    call = main_call(key)
    op, tensors = example(key), call.tensors()
    assert torch.equal(call(op, *tensors), call(op, *tensors))
    assert torch.equal(call(copy.deepcopy(op), *tensors), call(op, *tensors))


@each_operator()
def test_state_dict_round_trip(key: str) -> None:
    call = main_call(key)
    op, other, tensors = example(key), example(key), call.tensors()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    other.load_state_dict({name: x.clone() for name, x in op.state_dict().items()})
    assert torch.equal(call(other, *tensors), call(op, *tensors))


@each_call()
def test_the_plan_is_consistent(call: Call) -> None:
    op, tensors = example(call.key), call.tensors()
    plan = op.plan(*tensors, mask=call.mask, causal=call.causal)
    assert plan.engine in op.capabilities.engines
    assert plan.flops > 0
    assert plan.bytes > 0
    assert 0 < plan.density <= 1
    assert plan.why in str(plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("op", [Softmax(), SlidingWindow(4)], ids=lambda op: op.name)
def test_all_forms_of_a_mask_agree(op: Operator, engine: str, dtype: torch.dtype) -> None:
    """A mask as bool, as -inf or as the dtype's lowest value gives one output, also for rows that see nothing."""
    q, k, v = (x.to(dtype) for x in qkv(9, heads=2, kv_heads=2, width=8))
    seen = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[4] = False
    try:
        expected = op(q, k, v, mask=seen, causal=True, engine=engine)
    except UnsupportedEngine:
        return
    assert not expected[:, :, 4].any()
    for value in (float("-inf"), torch.finfo(dtype).min):
        bias = torch.zeros(9, 9, dtype=dtype).masked_fill(~seen, value)
        try:
            out = op(q, k, v, mask=bias, causal=True, engine=engine)
        except UnsupportedEngine:
            continue
        assert not out[:, :, 4].any(), value
        assert_near(out.double(), expected.double(), 4 * torch.finfo(dtype).eps)
