"""Declared transforms of calls work: the meta device, `vmap`, `torch.export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.ops.operator import ALL_TRANSFORMS
from tests.contracts import layers, operators
from tests.support.tensors import assert_near

OPERATORS = [f"operator-{key}" for key in operators.CLASSES]
NAMES = [*OPERATORS, *(f"layer-{key}" for key in layers.KEYS)]


class Called(nn.Module):
    """An operator or a layer with all arguments of a call but its tensors."""

    def __init__(self, inner: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.inner(*tensors, **self.options)


def example(name: str) -> tuple[Called, tuple[Tensor, ...]]:
    kind, key = name.split("-", 1)
    if kind == "operator":
        call = operators.main_call(key)
        return Called(operators.example(key), {"causal": call.causal}), call.tensors()
    layer_call = layers.main_call(key)
    x, source = layer_call.tokens()
    options = {"causal": layer_call.causal, **layers.example_inputs(key)}
    return Called(layers.example(key), options), (x,) if source is None else (x, source)


def on_meta(called: Called, tensors: tuple[Tensor, ...]) -> None:
    expected = called(*tensors)
    moved = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in called.options.items()}
    out = Called(called.inner.to("meta"), moved)(*(x.to("meta") for x in tensors))
    assert (out.device.type, out.shape, out.dtype) == ("meta", expected.shape, expected.dtype)


def under_vmap(called: Called, tensors: tuple[Tensor, ...]) -> None:
    several = [torch.stack([x, 0.5 * x, x.flip(-1)]) for x in tensors]
    together = torch.vmap(called)(*several)
    for i, out in enumerate(together):
        assert_near(out, called(*(x[i] for x in several)), 1e-10)


def exported(called: Called, tensors: tuple[Tensor, ...]) -> None:
    program = torch.export.export(called, tensors, strict=False).module()
    changed = tuple(x.flip(-1) for x in tensors)
    assert_near(program(*changed), called(*changed), 1e-10)
    assert_near(called(*tensors), program(*tensors), 1e-10)  # clear caches whose tensors do not belong to the graph


WAYS: dict[str, Callable[[Called, tuple[Tensor, ...]], None]] = {
    "meta": on_meta, "vmap": under_vmap, "export": exported,
}  # fmt: skip


def try_out(name: str, way: str) -> None:
    called, tensors = example(name)
    if way in called.inner.capabilities.transforms:
        WAYS[way](called, tensors)
        return
    with pytest.raises(Exception, match="data-dependent|item"):
        WAYS[way](called, tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["meta", "vmap"])
def test_declared_transforms_work(name: str, way: str) -> None:
    try_out(name, way)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_declared_export_works(name: str) -> None:
    try_out(name, "export")


@pytest.mark.parametrize("name", ["operator-sliding_window", "operator-hedgehog", "layer-multi_head"])
def test_exported(name: str) -> None:
    """Three systems are exported in every run."""
    try_out(name, "export")


def test_all_transforms_are_covered() -> None:
    assert set(WAYS) == ALL_TRANSFORMS
