"""The flops of a plan equal those that PyTorch counts during the call."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.ops.base.linear import Linear
from foveate.ops.base.selective import Selective
from foveate.ops.base.test_time import Memory
from foveate.ops.operator import Operator
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.contracts.operators import CLASSES, HEADS, WIDTH, example
from tests.support.tensors import qkv

N = 256
#: Operators that choose pairs are left out, since these engines compute all; aaren is too, since it merges elementwise.
KEYS = [key for key, cls in CLASSES.items() if not issubclass(cls, Selective) and key != "aaren"]


def counted(op: Operator, engine: str) -> tuple[float, float]:
    """Return the flops that PyTorch counts in a call, and those of its plan."""
    causal = "self" not in op.capabilities.patterns
    given = [x.float() for x in qkv(N, batch=1, heads=HEADS, kv_heads=HEADS, width=WIDTH)]
    inputs = {name: op.example_input(name, 1, HEADS, N).float() for name in op.capabilities.inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        op(*given, causal=causal, engine=engine, **inputs)
    whole = causal and engine == "reference" and not isinstance(op, Linear)  # the plan counts only the past
    return counter.get_total_flops(), op.plan(*given, causal=causal, engine=engine).flops * (2 * N / (N + 1)) ** whole


@pytest.mark.parametrize("key", [key for key in KEYS if "reference" in CLASSES[key].capabilities.engines])
def test_a_plan_counts_products(key: str) -> None:
    seen, planned = counted(example(key, N).float(), "reference")
    assert planned / 1.06 <= seen <= 1.06 * planned


@pytest.mark.parametrize("key", [key for key in KEYS if issubclass(CLASSES[key], Linear | Memory)])
def test_chunks_and_states_are_counted(key: str) -> None:
    seen, planned = counted(example(key, N).float(), "chunked")
    assert planned / 1.15 <= seen <= 1.15 * planned


@pytest.mark.parametrize("key", [key for key, cls in CLASSES.items() if issubclass(cls, Selective)])
def test_shapes_alone_have_a_plan(key: str) -> None:
    """Nothing says how many keys are chosen, so the plan counts the most."""
    given = [x.to("meta", torch.float32) for x in qkv(N, batch=1, heads=HEADS, kv_heads=HEADS, width=WIDTH)]
    op = example(key, N)
    plan = op.plan(*given, causal="self" not in op.capabilities.patterns)
    assert 0 < plan.density <= 1
    assert "nothing says how many keys are chosen" in plan.why


def test_a_plan_never_counts_more_keys_than_there_are() -> None:
    given = qkv(16, batch=1, heads=HEADS, kv_heads=HEADS, width=WIDTH)
    assert "of which 100% are chosen" in SlidingWindow().plan(*given, causal=True).why
