"""What every operator of the catalogue refuses, and in which words."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError, OptionError, ShapeError, UnsupportedPattern
from foveate.ops.base.scored import Scored
from foveate.ops.base.streaming import Streaming
from foveate.ops.operator import ALL_MASKS, ALL_PATTERNS
from tests.contracts.operators import CLASSES, HEADS, KV_HEADS, WIDTH, Call, each_operator, example, main_call
from tests.support.tensors import gradients, qkv


@pytest.mark.parametrize(
    ("key", "pattern"),
    [(key, p) for key, cls in CLASSES.items() for p in sorted(ALL_PATTERNS - cls.capabilities.patterns)],
)
def test_a_pattern_that_it_lacks_is_refused_by_name(key: str, pattern: Any) -> None:
    call = Call(key, pattern)
    for act in (call.__call__, lambda op, q, k, v: op.plan(q, k, v, causal=call.causal)):
        with pytest.raises(UnsupportedPattern, match=f'{CLASSES[key].__name__} does not define "{pattern}"'):
            act(example(key), *call.tensors())


@pytest.mark.parametrize(
    ("key", "kind"),
    [(key, kind) for key, cls in CLASSES.items() for kind in sorted(ALL_MASKS - cls.capabilities.masks)],
)
def test_a_mask_that_it_cannot_take_is_refused_by_name(key: str, kind: Any) -> None:
    call = Call(key, main_call(key).pattern, kind)
    with pytest.raises(UnsupportedPattern, match=f'{CLASSES[key].__name__} does not take a mask of kind "{kind}"'):
        call(example(key), *call.tensors())


MALFORMED: dict[str, tuple[str, dict[str, Any]]] = {
    "not a tensor": ("q", {"q": [1.0]}),
    "rank": ("k", {"k": torch.zeros(2, 12, WIDTH)}),
    "whole numbers": ("v", {"v": torch.zeros(2, KV_HEADS, 12, WIDTH, dtype=torch.int64)}),
    "width": ("k", {"k": torch.zeros(2, KV_HEADS, 12, WIDTH + 2, dtype=torch.float64)}),
    "length": ("v", {"v": torch.zeros(2, KV_HEADS, 11, WIDTH, dtype=torch.float64)}),
    "heads": ("q", {"q": torch.zeros(2, HEADS + 1, 12, WIDTH, dtype=torch.float64)}),
    "batch": ("q", {"q": torch.zeros(3, HEADS, 12, WIDTH, dtype=torch.float64)}),
    "dtype": ("k", {"k": torch.zeros(2, KV_HEADS, 12, WIDTH)}),
    "device": ("v", {"v": torch.zeros(2, KV_HEADS, 12, WIDTH, dtype=torch.float64, device="meta")}),
    "mask shape": ("mask", {"mask": torch.ones(2, 1, 1, 13, dtype=torch.bool)}),
    "mask dtype": ("mask", {"mask": torch.ones(12, dtype=torch.int64)}),
    "mask device": ("mask", {"mask": torch.ones(12, dtype=torch.bool, device="meta")}),
    "causal": ("causal", {"causal": "yes"}),
    "scale": ("scale", {"scale": "large"}),
    "infinite scale": ("scale", {"scale": float("inf")}),
    "engine": ("engine", {"engine": "warp"}),
    "input": ("nonsense", {"nonsense": torch.zeros(1)}),
}


@each_operator()
@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_call_names_the_argument(key: str, what: str) -> None:
    name, wrong = MALFORMED[what]
    call = main_call(key)
    q, k, v = call.tensors()
    with pytest.raises(FoveateError) as caught:
        example(key)(**{"q": q, "k": k, "v": v, "causal": call.causal, **wrong})
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), message
    assert "\n" not in message


@each_operator()
def test_an_option_that_it_lacks_is_refused_by_name(key: str) -> None:
    call = main_call(key)
    with pytest.raises(OptionError, match="nonsense"):
        foveate.attend(*call.tensors(), CLASSES[key], causal=call.causal, nonsense=1)


@each_operator(lambda cls: cls.capabilities.inputs)
def test_further_inputs_are_used_and_checked(key: str) -> None:
    call = main_call(key)
    op, tensors = example(key), call.tensors()
    plain = call(op, *tensors)
    for name in sorted(op.capabilities.inputs):
        given = op.example_input(name, 2, HEADS, call.lengths[1]).double().requires_grad_()
        out = call(op, *tensors, **{name: given})
        assert not torch.allclose(out, plain)
        (grad,) = gradients(out, [given])
        assert grad.isfinite().all()
        assert grad.any()
        with pytest.raises(ShapeError, match=name):
            call(op, *tensors, **{name: given[..., :-1]})


@each_operator(lambda cls: cls.capabilities.streaming is not None)
def test_a_malformed_step_is_refused(key: str) -> None:
    q, k, v = qkv(1, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    op = example(key)
    state = op.init_state(2, HEADS, KV_HEADS, WIDTH, WIDTH, dtype=torch.float64)
    for wrong, says in (
        ((q, k, v, None), "state"),
        ((q[0], k, v, state), r"\bq\b"),
        ((q.repeat(1, 1, 2, 1), k, v, state), "one token"),
    ):
        with pytest.raises(FoveateError, match=says):
            op.step(*wrong)
    for name, value in (("batch", 0), ("heads", 3), ("kv_heads", 0), ("key_dim", -1), ("value_dim", 1.5)):
        sizes = {"batch": 2, "heads": HEADS, "kv_heads": KV_HEADS, "key_dim": WIDTH, "value_dim": WIDTH, name: value}
        with pytest.raises(OptionError, match=name):
            op.init_state(**sizes)


class Offline(Scored):
    """An operator that cannot stream, so that this is tested whether or not the catalogue has one."""

    capabilities = replace(Scored.capabilities, streaming=None)


def test_what_cannot_stream_says_so() -> None:
    still = [example(key) for key, cls in CLASSES.items() if cls.capabilities.streaming is None]
    for op in (Offline(), *still):
        if not isinstance(op, Streaming):
            assert not hasattr(op, "step"), "no stub"
            continue
        with pytest.raises(UnsupportedPattern, match=f"{op.name} cannot go one token at a time"):
            op.init_state(2, HEADS, KV_HEADS, WIDTH, WIDTH)
        with pytest.raises(UnsupportedPattern, match=f"{op.name} cannot go one token at a time"):
            op.step(*qkv(1, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH), None)


def test_facts_in_the_wrong_place_are_refused() -> None:
    """A class that was written for an earlier version would be ignored in silence."""
    for body, says in (({"masks": frozenset()}, "belongs into its `capabilities`"), ({"steps": None}, "streaming now")):
        with pytest.raises(TypeError, match=says):
            type("Old", (Scored,), body)
    with pytest.raises(TypeError, match="kept is trim_state now"):
        type("Old", (Scored,), {"kept": lambda self, state: state})
