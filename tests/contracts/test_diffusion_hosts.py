"""The contract of the diffusion host: methods act on networks of diffusers, and no-ops change no bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.selection import Indices, Selection
from foveate.host import Method, Site
from foveate.steer import StructuredDiffusion
from tests.contracts.methods import ON_DIFFUSION
from tests.support.diffusion_checks import EVERY, NATIVE, PATHS, Doubles, Fingerprint
from tests.support.diffusion_models import CROSSING, MODELS, call, inputs, model
from tests.support.host_models import Adds, Reads, SameOutput

# -- methods of the catalogue ------------------------------------------------------------------------------------------

#: Methods that act on diffusion models alone, for the prompt that `inputs("unet")` gives its first row.
METHODS: dict[str, Callable[[Tensor], Method]] = {
    "structured_diffusion": lambda full: StructuredDiffusion(full, [full.flip(0)], [(2, 5)]),
}


def test_every_method_of_the_catalogue_is_here() -> None:
    assert METHODS.keys() == ON_DIFFUSION


@pytest.mark.parametrize("key", METHODS)
@torch.no_grad()
def test_it_acts_and_leaves_no_trace(key: str) -> None:
    given, before, plain = inputs("unet"), Fingerprint(model("unet")), call("unet")
    method, results = METHODS[key](given["encoder_hidden_states"][0]), []
    for _ in range(2):
        with foveate.apply(model("unet"), method):
            results.append(call("unet"))
    assert torch.equal(*results) and not torch.allclose(results[0], plain, atol=1e-3)
    with pytest.raises(RuntimeError), foveate.apply(model("unet"), method):
        model("unet")(**{**given, "sample": given["sample"][:, :2]})
    assert Fingerprint(model("unet")) == before and torch.equal(call("unet"), plain)


# -- methods that change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "masked"), [*((name, False) for name in MODELS), *((name, True) for name in CROSSING)]
)
@torch.no_grad()
def test_no_ops(name: str, masked: bool, path: str) -> None:
    expected = call(name, masked=masked)
    with foveate.apply(model(name), *(kind() for kind in PATHS[path])) as run:
        got = call(name, masked=masked)
    assert torch.equal(call(name, masked=masked), expected)
    assert run.stats.calls == len(run.layers) > 1
    if path in NATIVE:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["no method", "output", "weights", "indices"])
@EVERY
def test_gradients(name: str, path: str) -> None:
    def gradients(*methods: Method) -> list[Tensor | None]:
        model(name).zero_grad()
        with foveate.apply(model(name), *methods):
            call(name).square().mean().backward()
        return [parameter.grad for parameter in model(name).parameters()]

    expected = [None if each is None else each.clone() for each in gradients()]
    plain, got = [None if each is None else each.clone() for each in expected], gradients(*(k() for k in PATHS[path]))
    model(name).zero_grad()
    assert sum(each is not None for each in plain) > 20
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@EVERY
@torch.no_grad()
def test_in_half_precision(name: str) -> None:
    half = copy.deepcopy(model(name)).to(torch.bfloat16)
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs(name).items()}
    expected = half(**given, return_dict=False)[0]
    with foveate.apply(half, SameOutput()):
        assert torch.equal(half(**given, return_dict=False)[0], expected)


# -- methods that change something -------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_edits_compose_in_order(name: str) -> None:
    """Methods of one run, and of nested ones, get the result of those before them; the network gets the last."""

    def ends(*runs: tuple[Method, ...]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        last = Reads(lambda site: None)
        last.read = lambda site, out: seen.append(out)  # type: ignore[method-assign]
        with ExitStack() as stack:
            for methods in (*runs, (last,)):
                stack.enter_context(foveate.apply(model(name), *methods))
            whole = call(name)
        return seen[0], whole

    plain, whole = ends()
    for both in (((Adds(1.0), Doubles()),), ((Adds(1.0),), (Doubles(),))):
        first, changed = ends(*both)
        assert torch.equal(first, (plain + 1) * 2)
        assert not torch.allclose(changed, whole, atol=1e-3)
    assert torch.equal(ends((Doubles(), Adds(1.0)))[0], plain * 2 + 1)


@EVERY
@torch.no_grad()
def test_a_method_may_replace_weights_and_choose_keys(name: str) -> None:
    """Uniform weights give each query the mean value; one selected key gives each query its value."""
    means, firsts = [], []

    class Uniform(Method):
        def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
            return torch.full_like(weights, 1 / weights.shape[-1])

        def read(self, site: Site, out: Tensor) -> None:
            means.append((out - site.v.mean(2, keepdim=True)).abs().max())

    class First(Method):
        def select(self, site: Site) -> Selection:
            n, s = site.q.shape[2], site.k.shape[2]
            return Indices(torch.zeros(1, 1, n, 1, dtype=torch.long), n, s)

        def read(self, site: Site, out: Tensor) -> None:
            firsts.append((out - site.v[:, :, :1]).abs().max())

    for method, found in ((Uniform(), means), (First(), firsts)):
        with foveate.apply(model(name), method) as run:
            call(name)
        assert len(found) == len(run.layers) and max(found) < 1e-5


@torch.no_grad()
def test_the_weights_are_those_of_the_network() -> None:
    """Weights that a method reads, times the values, are the output that PyTorch's kernel gives."""
    for name in MODELS:
        gaps: list[Tensor] = []

        class Checks(Method):
            def read(self, site: Site, out: Tensor) -> None:
                logits = site.q @ site.k.mT * site.scale
                weights = (logits if site.mask is None else logits + site.mask).softmax(-1)
                gaps.append((weights @ site.v - out).abs().max())  # noqa: B023

        with foveate.apply(model(name), Checks()):
            call(name, masked=name in CROSSING)
        assert len(gaps) > 1 and max(gaps) < 1e-5
