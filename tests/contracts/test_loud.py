"""Memories that learn from what they read, on loud tokens: finite answers, or an error that says what happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import DivergedError
from foveate.nn import MultiHeadAttention
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.ops.base.test_time import Memory
from tests.contracts.layers import DIM, HEADS as LAYER_HEADS, SYSTEMS
from tests.contracts.operators import CLASSES, HEADS, KV_HEADS, WIDTH, example
from tests.support.tensors import qkv

LENGTH = 200
OPERATORS = [key for key, cls in CLASSES.items() if issubclass(cls, Memory)]


def memories(module: nn.Module) -> list[Memory]:
    return [part for part in module.modules() if isinstance(part, Memory)]


def made(cls: type[Layer]) -> Layer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls.example(DIM, LAYER_HEADS, LENGTH)


def around(key: str) -> Layer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MultiHeadAttention(DIM, LAYER_HEADS, op=CLASSES[key].example(LAYER_HEADS, DIM // LAYER_HEADS, LENGTH))


LAYERS: dict[str, Callable[[], Layer]] = {
    key: lambda cls=cls: made(cls) for key, cls in SYSTEMS.items() if memories(made(cls))
} | {f"multi_head of {key}": lambda key=key: around(key) for key in OPERATORS}  # fmt: skip


def loud(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of standard deviation 10."""
    return 10 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def finite(call: Callable[[], Tensor]) -> bool:
    """Whether a call gives finite numbers; False where it raises the error that names the cause."""
    said = None
    try:
        out = call()
    except DivergedError as error:
        said = str(error)
    if said is None:
        assert out.isfinite().all()
        return True
    assert "diverged" in said
    assert "max_grad_norm" in said
    assert "\n" not in said
    return False


def by_steps(layer: StreamingLayer, x: Tensor) -> Tensor:
    state, out = layer.init_state(len(x)), []
    for token in x.split(1, 1):
        y, state = layer.step(token, state)
        out.append(y)
    return torch.cat(out, 1)


@pytest.mark.parametrize("theta", [None, 0.5, 1.0])
@pytest.mark.parametrize("engine", ["chunked", "recurrent"])
@pytest.mark.parametrize("key", OPERATORS)
@torch.no_grad()
def test_operators_on_loud_tokens(key: str, engine: str, theta: float | None) -> None:
    op, (q, k, v) = example(key, LENGTH).float(), qkv(LENGTH, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH)
    given = [10 * x.float() for x in (q, k, v)]
    rates = {} if theta is None else {"theta": torch.full((2, HEADS, LENGTH), theta)}
    finite(lambda: op(*given, causal=True, engine=engine, **rates))
    op.unit = False
    finite(lambda: op(*given, causal=True, engine=engine, **rates))
    op.max_grad_norm = 1.0
    assert finite(lambda: op(*given, causal=True, engine=engine, **rates))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_on_loud_tokens(name: str) -> None:
    layer, x = LAYERS[name]().eval(), loud(2, LENGTH, DIM)
    assert isinstance(layer, StreamingLayer)
    calls = [lambda: layer(x, causal=True), lambda: layer.prefill(x)[0], lambda: by_steps(layer, x)]
    for call in calls:
        finite(call)
    for memory in memories(layer):
        memory.max_grad_norm = 1.0
    for call in calls:
        assert finite(call)
