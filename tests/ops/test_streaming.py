"""Streams: every operator with a state of constant size agrees in parallel, in chunks and token by token.

`prefill` returns the causal call's output, and a state from which steps continue.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.core.selection import Selection
from foveate.ops.base.kv_cached import Cached
from foveate.ops.base.linear import Linear
from foveate.ops.base.streaming import Streaming
from foveate.ops.base.test_time import Memory
from foveate.ops.memory.miras import Miras
from foveate.ops.operator import Operator
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.contracts.operators import CLASSES, HEADS, KV_HEADS, WIDTH, each_operator, example
from tests.support.tensors import assert_near, gradients, qkv

STREAMS = [
    key for key, cls in CLASSES.items()
    if issubclass(cls, Linear | Memory) and cls.capabilities.streaming == "exact"
    and "causal self" in cls.capabilities.patterns
]  # fmt: skip


def steady(key: str, length: int, heads: int = HEADS, width: int = WIDTH) -> Operator:
    """Make the operator's example, or a smooth one if the example takes signs of errors, which amplify rounding."""
    if key == "miras":
        return Miras("huber_norm", "l2", memory="linear", alpha=0.05, chunk=4)
    return example(key, length, heads, width)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """Return all tensors of a nested state."""
    if isinstance(state, Tensor):
        yield state
    elif is_dataclass(state):
        for each in fields(state):
            yield from tensors_of(getattr(state, each.name))
    elif isinstance(state, tuple | list):
        for each in state:
            yield from tensors_of(each)


def state_bytes(state: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_of(state))


def steps(op: Operator, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
    out = []
    for t in range(q.shape[2]):
        y, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        out.append(y)
    return torch.cat(out, 2), state


def begin(op: Operator, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return op.init_state(q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], dtype=q.dtype)


@pytest.mark.parametrize("key", STREAMS)
def test_parallel_chunked_and_steps_agree_in_float32(key: str) -> None:
    q, k, v = qkv(70, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, dtype=torch.float32, grad=True)
    op = steady(key, 70).float()
    wanted = [q, k, v, *op.parameters()]
    outs = {name: op(q, k, v, causal=True, engine=name) for name in op.capabilities.engines}
    outs["steps"], _ = steps(op, q, k, v, begin(op, q, k, v))
    found = {name: [out, *gradients(out, wanted)] for name, out in outs.items()}
    for name in outs.keys() - {"chunked"}:
        for one, other in zip(found[name], found["chunked"], strict=True):
            assert_near(one, other, 1e-5, name)


@each_operator(lambda cls: cls.capabilities.streaming == "exact")
@pytest.mark.parametrize(("prompt", "queries"), [(1, 1), (9, 9), (10, 3)])
def test_steps_continue_a_prefilled_prompt(key: str, prompt: int, queries: int) -> None:
    q, k, v = qkv(12, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    op = example(key)
    whole = op(q, k, v, causal=True)
    if prompt != queries and (
        "causal cross" not in op.capabilities.patterns or not isinstance(op, Linear | Memory | Cached)
    ):
        return  # with fewer queries, other operators may choose differently
    first = q[:, :, prompt - queries : prompt], k[:, :, :prompt], v[:, :, :prompt]
    out, state = op.prefill(*first)
    assert_near(out, op(*first, causal=True), 1e-12)
    assert_near(out, whole[:, :, prompt - queries : prompt], 1e-10)
    more, _ = steps(op, *(x[:, :, prompt:] for x in (q, k, v)), state)
    assert_near(more, whole[:, :, prompt:], 1e-10)


@pytest.mark.parametrize("key", STREAMS)
def test_a_prefilled_state_equals_that_of_steps(key: str) -> None:
    q, k, v = qkv(11, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    op = example(key)
    _, stepped = steps(op, q, k, v, begin(op, q, k, v))
    _, filled = op.prefill(q, k, v)
    for one, other in zip(tensors_of(filled), tensors_of(stepped), strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, 1e-10)
    assert state_bytes(filled) == state_bytes(begin(op, q, k, v))
    _, empty = op.prefill(*(x[:, :, :0] for x in (q, k, v)))
    for one, other in zip(tensors_of(empty), tensors_of(begin(op, q, k, v)), strict=True):
        assert_near(one, other, 0.0)


#: Every operator that streams, without further inputs and, if it takes some, with all of them.
PREFILLED = [
    (key, brings) for key, cls in CLASSES.items() if cls.capabilities.streaming is not None
    for brings in (False, True) if cls.capabilities.inputs or not brings
]  # fmt: skip
PROMPT = 13  # no other size of a call is equal, so it identifies the axis of tokens


def inputs_of(op: Operator, length: int) -> dict[str, Tensor]:
    """Make all further inputs of a causal call; inputs of queries equal those of keys."""
    names = sorted(name for name in op.capabilities.inputs if not name.endswith("_q"))
    made = {name: op.example_input(name, 2, HEADS, length) for name in names}
    return {name: x.double() if x.is_floating_point() else x for name, x in made.items()}


def cut(inputs: dict[str, Tensor], piece: slice) -> dict[str, Tensor]:
    """Cut the inputs of some tokens."""
    return {
        name: x.movedim(x.shape.index(PROMPT), 0)[piece].movedim(0, x.shape.index(PROMPT)) for name, x in inputs.items()
    }


@pytest.mark.parametrize("pieces", [(6, 13), (4, 8, 13), (1, 2, 13), (0, 13), (13, 13)], ids=str)
@pytest.mark.parametrize(("key", "brings"), PREFILLED, ids=str)
def test_a_prompt_in_pieces_is_the_whole_prompt(key: str, pieces: tuple[int, ...], brings: bool) -> None:
    """A prompt in pieces gives the outputs and the state of the whole one, and steps continue from it."""
    q, k, v = qkv(PROMPT + 3, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    op = example(key, PROMPT)
    given = inputs_of(op, PROMPT) if brings else {}
    whole, filled = op.prefill(*(x[:, :, :PROMPT] for x in (q, k, v)), **given)
    out, state, start = [], None, 0
    for end in pieces:
        piece = slice(start, end)
        y, state = op.prefill(*(x[:, :, piece] for x in (q, k, v)), state=state, **cut(given, piece))
        out.append(y)
        start = end
    assert state_bytes(state) == state_bytes(filled)
    for one, other in zip(tensors_of(state), tensors_of(filled), strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, 1e-10)
    if op.capabilities.streaming == "exact":
        assert_near(torch.cat(out, 2), whole, 1e-10)
    if not brings:
        tail = [x[:, :, PROMPT:] for x in (q, k, v)]
        assert_near(steps(op, *tail, state)[0], steps(op, *tail, filled)[0], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_operator(lambda cls: cls.capabilities.streaming == "exact")
def test_a_prompt_goes_on_from_a_state_in_every_dtype(key: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(10, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, dtype=dtype)
    op = steady(key, 10).to(dtype)
    first, second = ([x[:, :, piece] for x in (q, k, v)] for piece in (slice(0, 6), slice(6, 10)))
    _, state = op.prefill(*first)
    out, filled = op.prefill(*second, state=state)
    expected, stepped = steps(op, *second, state)
    assert out.dtype == dtype
    assert_near(out, expected, 1e-4 if dtype == torch.float32 else 0.1)
    assert [x.dtype for x in tensors_of(filled)] == [x.dtype for x in tensors_of(stepped)]


@each_operator(lambda cls: cls.capabilities.streaming == "exact")
def test_a_state_of_other_sizes_is_refused(key: str) -> None:
    """No size of a state or of a token is broadcast: batch, heads, or the width of values."""
    op = example(key)
    q, k, v = qkv(1, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    _, state = op.prefill(q, k, v)
    _, single = op.prefill(q[:1], k[:1], v[:1])
    for tokens, held in (((q, k, v), single), ((q[:1], k[:1], v[:1]), state), ((q, k, v[..., :1]), state)):
        for go_on in (lambda: op.step(*tokens, held), lambda: op.prefill(*tokens, state=held)):  # noqa: B023
            with pytest.raises((ShapeError, OptionError)) as caught:
                go_on()
            assert "\n" not in str(caught.value)


def test_a_state_of_another_linear_operator_is_refused() -> None:
    q, k, v = qkv(1, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    _, state = example("lightning_attention").prefill(q, k, v)
    with pytest.raises(ShapeError, match="state must fit LightNetAttention"):
        example("lightnet").step(q, k, v, state)


@each_operator(lambda cls: cls.capabilities.streaming is None)
def test_operators_without_streaming_refuse_prefill(key: str) -> None:
    op = example(key)
    if not isinstance(op, Streaming):
        assert not hasattr(op, "prefill"), "no stub"
        return
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        op.prefill(*qkv(6, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH))


LONG, LOOK = 100_000, 1000


@pytest.mark.slow
@pytest.mark.parametrize("key", STREAMS)
@torch.inference_mode()
def test_a_long_stream_neither_grows_nor_drifts(key: str) -> None:
    """The state's bytes are constant, and the last outputs equal those of a float64 call over all tokens."""
    q, k, v = qkv(LONG, batch=1, heads=1, kv_heads=1, width=4, dtype=torch.float32)
    rotation = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [-1.0, 0.0, 0.0, 0.0]])
    v = 0.3 * v + F.normalize(k, dim=-1) @ rotation  # values follow from keys, since memories of noise decay to nothing
    op = steady(key, 64, heads=1, width=4).float()
    state = begin(op, q, k, v)
    size, last = state_bytes(state), []
    for t, each in enumerate(zip(*(x.split(1, 2) for x in (q, k, v)), strict=True)):
        y, state = op.step(*each, state)
        if t >= LONG - LOOK:
            last.append(y)
        if t % LOOK == 0:
            assert state_bytes(state) == size
    exact = copy.deepcopy(op).double()(q[:, :, -LOOK:].double(), k.double(), v.double(), causal=True)
    assert (torch.cat(last, 2).double() - exact).norm() / exact.norm() < 1e-4


def test_a_streaming_step_selects_causally() -> None:
    """A step calls `select` with `causal=True`, since a mechanism's choice may depend on it."""
    calls = []

    class Recording(SlidingWindow):
        def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
            calls.append(causal)
            return super().select(q, k, causal, scale)

    q, k, v = qkv(4)
    op = Recording(2)
    _, state = op.prefill(q, k, v)
    op.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)
    assert calls == [True, True]
