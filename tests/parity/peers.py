"""What the parity tests share: peers that may be missing, weights that both sides take, and how the two are compared.

A peer is an independent implementation. Both sides are written as functions of the same leaves, so that every
conversion of weights between them is part of what is differentiated, and gradients are compared leaf by leaf.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.support.tensors import assert_near, gradients

#: Why a module of tests is skipped where its peer is not installed.
MISSING = "a peer that is not installed: make parity"


def source(package: str, path: str) -> Path:
    """A file of an installed package, found without importing the package; skips where that is missing."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"could not import {package!r}: {MISSING}", allow_module_level=True)
    return Path(next(iter(found.submodule_search_locations))) / path


def load(package: str, path: str) -> ModuleType:
    """A module of a package run by itself: for plain references in packages whose `__init__` needs a GPU's tools."""
    spec = importlib.util.spec_from_file_location(f"peer_{package}_{Path(path).stem}", source(package, path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pick(package: str, path: str, *names: str, **given: Any) -> Any:
    """Functions and classes out of a file whose imports cannot be had here, compiled as they stand there.

    They go without decorators, which cache, save memory or speak to tracers; `given` are the names that they use
    besides torch's.
    """
    file = source(package, path)
    definitions = [
        node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    wanted = [node for node in definitions if node.name in names]
    assert {node.name for node in wanted} == set(names), f"{file} has changed"
    for node in wanted:
        node.decorator_list = []
    scope: dict[str, Any] = {"__name__": file.stem, "torch": torch, "nn": nn, "F": F, "math": math, **given}
    lazy = __future__.annotations.compiler_flag  # annotations may name what is not here
    exec(compile(ast.Module([*wanted], []), str(file), "exec", flags=lazy), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})


def leaf(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    """Normally distributed numbers that want a gradient, in float64."""
    random = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=random, dtype=torch.float64)).requires_grad_()


def weights(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Leaves like the parameters of a module, moved a little, so that no bias is 0 and no gain is 1."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (p.detach().double() + 0.2 * torch.randn(p.shape, generator=random, dtype=torch.float64)).requires_grad_()
        for name, p in module.named_parameters()
    }


def call(module: nn.Module, given: Mapping[str, Tensor], *args: Any, **options: Any) -> Any:
    """A call of a module with these parameters, which must be all that it has."""
    buffers = {name: b.double() if b.is_floating_point() else b for name, b in module.named_buffers()}
    return functional_call(module, {**buffers, **given}, args, options, strict=True)


def agree(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: Mapping[str, Tensor] | list[Tensor],
    tolerance: float = 1e-10, grad_tolerance: float | None = None,
) -> None:  # fmt: skip
    """Outputs and the gradients of all leaves agree, up to `tolerance` of the largest number (at least of 1)."""
    named = leaves if isinstance(leaves, Mapping) else {str(index): x for index, x in enumerate(leaves)}
    a, b = ours(), theirs()
    assert b.detach().abs().max() > 1e-3, "the peer's output is as good as nothing"
    assert_near(a, b, tolerance, "output")
    pairs = zip(named, gradients(a, list(named.values())), gradients(b, list(named.values())), strict=True)
    for name, mine, other in pairs:
        assert_near(mine, other, grad_tolerance or 10 * tolerance, f"gradient of {name}")
