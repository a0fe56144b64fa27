"""The contract of initialisers: they set the parameters that they name, from a generator, and nothing else."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate.train
from foveate.core.errors import FoveateError
from foveate.train import Initialiser
from tests.contracts.initialisers import CASES, CLASSES, make

EVERY = pytest.mark.parametrize("name", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in (*model.named_parameters(), *model.named_buffers())}


def test_every_initialiser_is_catalogued() -> None:
    found = set()
    for module in pkgutil.walk_packages(foveate.train.__path__, "foveate.train."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Initialiser) and value is not Initialiser:
                found.add(value.__name__)
    assert found == CLASSES.keys() != set()


@EVERY
@DTYPES
def test_it_sets_what_it_names_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    initialise, model, inputs = make(name, dtype)
    before, kept = values(model), dict(model.named_parameters())
    facts = {path: (x.dtype, x.shape, x.device, x.requires_grad, x.grad) for path, x in kept.items()}
    named = initialise(model, seeded())
    after = values(model)
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert changed, "the example changes something"
    assert changed <= set(named) <= kept.keys()
    assert len(named) == len(set(named))
    assert all(x is kept[path] for path, x in model.named_parameters())
    assert facts == {path: (x.dtype, x.shape, x.device, x.requires_grad, x.grad) for path, x in kept.items()}
    with torch.no_grad():
        out: Any = model(**inputs)
    assert getattr(out, "logits", out).isfinite().all()


@EVERY
def test_the_same_generator_gives_the_same_values(name: str) -> None:
    found, states, before = [], [], torch.get_rng_state()
    for seed in (0, 0, 1):
        initialise, model, _ = make(name)
        random = seeded(seed)
        initialise(model, random)
        found.append(values(model))
        states.append(torch.equal(random.get_state(), seeded(seed).get_state()))
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator"
    differs = not all(torch.equal(found[0][path], found[2][path]) for path in found[0])
    assert differs == (not states[0]), "it draws numbers, and they matter"


@EVERY
def test_its_model_still_trains(name: str) -> None:
    initialise, model, inputs = make(name)
    initialise(model, seeded())
    out: Any = model(**inputs)
    getattr(out, "logits", out).square().sum().backward()
    for path, x in model.named_parameters():
        assert x.requires_grad and (x.grad is None or x.grad.isfinite().all()), path


@EVERY
def test_a_model_without_such_parts_is_refused(name: str) -> None:
    initialise, _, _ = make(name)
    with pytest.raises(FoveateError, match="module=Linear must hold") as caught:
        initialise(nn.Linear(3, 3), seeded())
    assert "\n" not in str(caught.value)
