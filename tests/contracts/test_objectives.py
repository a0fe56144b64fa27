"""The contract of objectives: a scalar and its parts, from a model that is left as it was."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate.train
from foveate.core.errors import FoveateError
from foveate.train import Objective
from tests.contracts.objectives import CASES, CLASSES, Generators, make

EVERY = pytest.mark.parametrize("name", CASES)
#: A bias of all keys moves the scores of a query alike, so that nothing depends on it.
IRRELEVANT = ("attention.self.key.bias",)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def test_every_objective_is_catalogued() -> None:
    found = set()
    for module in pkgutil.walk_packages(foveate.train.__path__, "foveate.train."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Objective) and value is not Objective:
                found.add(value.__name__)
    assert found == CLASSES.keys()
    assert {"AttentionAT", "CutMix"} <= found


@EVERY
def test_the_total_is_a_scalar_that_trains_every_parameter(name: str) -> None:
    objective, model, batch = make(name)
    total = objective(model, batch).total
    assert total.shape == () and total.isfinite()
    total.backward()
    for parameter, x in model.named_parameters():
        if not parameter.endswith(IRRELEVANT):
            assert x.grad is not None and x.grad.isfinite().all() and x.grad.any(), parameter


@EVERY
def test_parts_are_detached_and_add_up(name: str) -> None:
    objective, model, batch = make(name)
    loss = objective(model, batch)
    assert all(part.shape == () and not part.requires_grad for part in loss.parts.values())
    assert len(loss.parts) != 1, "a loss of one part has none"
    if loss.parts:
        torch.testing.assert_close(sum(loss.parts.values()), loss.total.detach())


def traces(model: nn.Module) -> dict[str, Any]:
    """Return all of a model that a call could change, except the running statistics of batch norms."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = {} if isinstance(module, NORMS) else dict(module.named_buffers(path, recurse=False))
        found |= own | dict(module.named_parameters(path, recurse=False))
        hooks = [value for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]
        found[f"{path} is"] = (module.training, [list(each) for each in hooks], sorted(vars(module)))
    return {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in found.items()}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@EVERY
@pytest.mark.parametrize("graded", [False, True], ids=["without gradients", "with gradients"])
def test_the_model_and_the_batch_are_left_as_they_were(name: str, graded: bool) -> None:
    objective, model, batch = make(name)
    for x in model.parameters():
        x.grad = torch.full_like(x, 7.0) if graded else None
    before, options = traces(model), dict(vars(objective))
    given = {key: x.clone() for key, x in batch.items()}
    for call in (objective, objective.plain):
        call(model, batch)
        after = traces(model)
        assert after.keys() == before.keys()
        assert [key for key in before if not same(before[key], after[key])] == []
        for x in model.parameters():
            assert x.grad is None if not graded else bool((x.grad == 7.0).all())
    assert all(torch.equal(batch[key], x) and not batch[key].requires_grad for key, x in given.items())
    assert vars(objective) == options, "only a generator may change"


@EVERY
def test_the_same_generator_gives_the_same_loss(name: str) -> None:
    objective, model, batch = make(name)
    drawn, before = Generators.of(objective, model), torch.get_rng_state()
    first = objective(model, batch).total
    moved = [not torch.equal(generator.get_state(), state) for generator, state in drawn.states]
    drawn.restore()
    assert torch.equal(objective(model, batch).total, first)
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator"
    if any(moved):
        assert not all(torch.equal(objective(model, batch).total, first) for _ in range(8)), "it draws, to no effect"


@EVERY
def test_it_works_under_autocast(name: str) -> None:
    objective, model, batch = make(name)
    drawn = Generators.of(objective, model)
    exact = objective(model, batch).total
    drawn.restore()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model, batch)
    assert abs(loss.total.float() - exact) < 0.05 * max(1.0, abs(exact)), "bfloat16 has 8 bits"
    loss.total.backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


@EVERY
@torch.no_grad()
def test_evaluation_needs_no_gradients_and_repeats(name: str) -> None:
    objective, model, batch = make(name)
    drawn = Generators.of(objective, model.eval())
    first = objective.plain(model, batch)
    assert first.total.shape == () and first.total.isfinite() and not first.total.requires_grad
    assert torch.equal(objective.plain(model, batch).total, first.total)
    drawn.restore()
    assert objective(model, batch).total.isfinite()


@EVERY
def test_a_batch_that_lacks_what_is_needed_is_refused(name: str) -> None:
    objective, model, batch = make(name)
    wanted = "labels" if "labels" in batch else next(iter(batch))
    less = {key: x for key, x in batch.items() if key != wanted}
    for call in (objective, objective.plain):
        with pytest.raises(FoveateError, match=f'batch must hold .*"{wanted}"') as caught:
            call(model, less)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if "criterion" in signature(cls).parameters])
def test_a_criterion_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(FoveateError, match="^criterion=3 must be a function") as caught:
        CLASSES[name](criterion=3)
    assert "\n" not in str(caught.value)
