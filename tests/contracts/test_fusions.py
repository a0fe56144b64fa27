"""The contract that every fusion has to keep."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError, OptionError, ShapeError
from foveate.nn import Fusion
from tests.contracts.fusions import BATCH, KEYS, SIZES, example, inputs, masks, places, shape, soiled, total
from tests.support.tensors import assert_near

GARBAGE = (float("nan"), float("inf"), 1e30)
fusions = pytest.mark.parametrize("key", KEYS)


def assert_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert_near(ours[name], x, tolerance, name)


def of(out: Mapping[str, Tensor], example: slice) -> dict[str, Tensor]:
    return {name: x[example] for name, x in out.items()}


# -- shapes and calls --------------------------------------------------------------------------------------------------


@fusions
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_outputs_have_the_declared_shapes(key: str, sizes: tuple[int, ...], batch: int) -> None:
    fusion = example(key)
    out = fusion(**inputs(fusion, batch, sizes))
    assert list(out) == [each.name for each in fusion.outputs]
    for each in fusion.outputs:
        assert out[each.name].shape == shape(each, fusion, batch, sizes), each.name
        assert out[each.name].isfinite().all()
        assert out[each.name].dtype in (torch.float64, torch.long)


@fusions
def test_positions_and_names_agree(key: str) -> None:
    fusion = example(key)
    given = inputs(fusion)
    expected = fusion(**given)
    assert_same(fusion(*given.values()), expected, 0)
    first, *others = given
    assert_same(fusion(given[first], **{name: given[name] for name in reversed(others)}), expected, 0)


@fusions
def test_each_stream_has_an_effect_on_others(key: str) -> None:
    fusion = example(key)
    given = {name: x.requires_grad_() for name, x in inputs(fusion).items()}
    out = fusion(**given)
    for name, x in given.items():
        others = {other: y for other, y in out.items() if other != name}
        (grad,) = torch.autograd.grad(total(others), x, retain_graph=True)
        assert (grad.flatten(1).abs().sum(1) > 0).all(), name


# -- what is not there -------------------------------------------------------------------------------------------------


def gone(fusion: Fusion) -> dict[str, dict[str, Any]]:
    """Return ways to say that something is missing, and what is real then, by name."""
    ways: dict[str, dict[str, Any]] = {"masks": {"masks": masks(fusion)}}
    some = torch.tensor([True, False, False])
    for each in fusion.streams:
        ways[f"no {each.name}"] = {"present": {each.name: some}}
    ways["nothing"] = {"present": {each.name: some for each in fusion.streams}}
    ways["both"] = {"masks": masks(fusion, 1), "present": {each.name: ~some for each in fusion.streams}}
    return ways


def real(fusion: Fusion, said: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for each in fusion.streams:
        mask = torch.ones(places(each, fusion), dtype=torch.bool)
        mask = mask & said.get("masks", {}).get(each.name, mask)
        present = said.get("present", {}).get(each.name, torch.ones(BATCH, dtype=torch.bool))
        found[each.name] = mask & present.view(-1, *[1] * (mask.dim() - 1))
    return found


@fusions
def test_what_is_missing_has_no_effect(key: str) -> None:
    """Values and gradients do not depend on what stands behind a mask or in a missing stream."""
    fusion = example(key)
    for way, said in gone(fusion).items():
        there, found = real(fusion, said), []
        for garbage in (0.0, *GARBAGE):
            given = {name: x.requires_grad_() for name, x in soiled(inputs(fusion), there, garbage).items()}
            out = fusion(**given, **said)
            leaves = [*given.values(), *fusion.parameters()]
            grads = torch.autograd.grad(total(out), leaves, allow_unused=True)
            found.append((out, grads))
            for (name, x), grad in zip(given.items(), grads, strict=False):
                lost = ~there[name].view(*there[name].shape, *[1] * (x.dim() - there[name].dim())).expand_as(x)
                assert grad is None or not grad[lost].any(), f"{way}: {name} gets a gradient from nothing"
        for x in found[0][0].values():
            assert x.isfinite().all(), way
        for out, grads in found[1:]:
            assert_same(out, found[0][0], 0)
            for ours, expected in zip(grads, found[0][1], strict=True):
                assert (ours is None) == (expected is None)
                if expected is not None:
                    assert expected.isfinite().all(), way
                    assert_near(ours, expected, 0, way)


@fusions
def test_the_complete_are_as_they_are_alone(key: str) -> None:
    """An example gets the same beside examples that lack something, or everything."""
    fusion = example(key)
    given = inputs(fusion)
    alone = fusion(**{name: x[:1] for name, x in given.items()})
    for way, said in gone(fusion).items():
        if way in ("masks", "both"):
            continue
        assert_same(of(fusion(**given, **said), slice(0, 1)), alone)


@fusions
def test_examples_are_independent(key: str) -> None:
    fusion = example(key)
    given, mask = inputs(fusion), masks(fusion)
    together = fusion(**given, masks=mask)
    for i in range(BATCH):
        one = slice(i, i + 1)
        alone = fusion(**of(given, one), masks=of(mask, one))
        assert_same(alone, of(together, one))


@fusions
def test_missing_and_masked_are_one(key: str) -> None:
    fusion = example(key)
    given, present = inputs(fusion), torch.tensor([True, False, True])
    for each in fusion.streams:
        mask = present.view(-1, *[1] * len(each.axes)).expand(places(each, fusion))
        assert_same(
            fusion(**given, masks={each.name: mask}), fusion(**given, present={each.name: present}), 0
        )  # fmt: skip


@fusions
def test_left_out_is_missing(key: str) -> None:
    fusion = example(key)
    for each in fusion.streams:
        if each.optional:
            given, nobody = inputs(fusion), torch.zeros(BATCH, dtype=torch.bool)
            without = fusion(**given, present={each.name: nobody})
            assert_same(fusion(**{**given, each.name: None}), without, 0)
            given.pop(each.name)
            assert_same(fusion(**given), without, 0)


# -- gradients, numbers, state -----------------------------------------------------------------------------------------


@fusions
def test_gradients(key: str) -> None:
    fusion, random = example(key), torch.Generator().manual_seed(5)
    given = {name: x.requires_grad_() for name, x in inputs(fusion).items()}
    leaves = [*given.values(), *fusion.parameters()]
    grads = torch.autograd.grad(total(fusion(**given)), leaves, allow_unused=True)
    step = 1e-6
    for leaf, grad in zip(leaves, grads, strict=True):
        way = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
        grad = torch.zeros_like(leaf) if grad is None else grad
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * way
                ends.append(total(fusion(**given)))
                leaf -= sign * step * way
        slope = (grad * way).sum()
        assert_near((ends[0] - ends[1]) / (2 * step), slope, 1e-4 * (1 + slope.abs().item()))


@fusions
def test_gradients_reach_every_parameter(key: str) -> None:
    fusion = example(key).train()
    given = inputs(fusion)
    for each in fusion.streams:
        if each.optional:
            given.pop(each.name)
    total(fusion(**given)).backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None]


@fusions
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_other_dtypes(key: str, dtype: torch.dtype, tolerance: float) -> None:
    fusion = example(key).to(dtype)
    given = inputs(fusion, dtype=dtype)
    out = fusion(**given)
    expected = copy.deepcopy(fusion).double()(**{name: x.double() for name, x in given.items()})
    for name, x in expected.items():
        if x.is_floating_point():
            assert out[name].dtype == dtype, name
            assert (out[name].double() - x).norm() < tolerance * x.norm(), name


@fusions
def test_a_state_dict_makes_a_twin(key: str) -> None:
    fusion = example(key)
    twin = copy.deepcopy(fusion)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    given = inputs(fusion)
    twin.load_state_dict(fusion.state_dict())
    assert_same(twin(**given), fusion(**given), 0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(error: type[FoveateError], message: str, fusion: Fusion, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        fusion(*args, **options)
    assert "\n" not in str(caught.value)


@fusions
def test_wrong_streams(key: str) -> None:
    fusion = example(key)
    given = inputs(fusion)
    takes = f"takes the streams {', '.join(given)}"
    refused(OptionError, f"{takes}; got 'nonsense'", fusion, **given, nonsense=given[next(iter(given))])
    refused(OptionError, f"{takes}; got {len(given) + 1} inputs", fusion, *given.values(), next(iter(given.values())))
    name = next(iter(given))
    refused(OptionError, f"{takes}; got '{name}' twice", fusion, given[name], **given)
    for each in fusion.streams:
        without = {other: x for other, x in given.items() if other != each.name}
        if not each.optional:
            refused(OptionError, f"needs the stream '{each.name}'", fusion, **without)
            refused(OptionError, f"needs the stream '{each.name}'", fusion, **without, **{each.name: None})


@fusions
def test_wrong_shapes(key: str) -> None:
    fusion = example(key)
    given = inputs(fusion)
    for each in fusion.streams:
        x = given[each.name]
        wrong = [x[..., None], x.long(), x.tolist(), x[0]]
        wrong += [torch.cat([x, x[..., :1]], -1)] if each.dim is not None else []
        for bad in wrong:
            refused(ShapeError, f"{each.name} must be real numbers", fusion, **{**given, each.name: bad})
    first, *_, last = fusion.streams
    longer = torch.cat([given[last.name], given[last.name][:1]])
    refused(ShapeError, f"{last.name} must have B={BATCH}", fusion, **{**given, last.name: longer})
    for axis in set(first.axes) & set(last.axes):
        along = last.axes.index(axis) + 1
        longer = torch.cat([given[last.name], given[last.name].narrow(along, 0, 1)], along)
        refused(ShapeError, f"{last.name} must have {axis}=", fusion, **{**given, last.name: longer})


@fusions
def test_wrong_masks(key: str) -> None:
    fusion = example(key)
    given = inputs(fusion)
    seen = torch.ones(BATCH, dtype=torch.bool)
    for word in ("masks", "present"):
        refused(OptionError, "must name streams of the call", fusion, **given, **{word: {"nonsense": seen}})
    for each in fusion.streams:
        mask = torch.ones(places(each, fusion), dtype=torch.bool)
        for bad in (mask.double(), torch.ones(BATCH + 1, *mask.shape[1:], dtype=torch.bool), mask[..., None]):
            refused(ShapeError, rf"masks\['{each.name}'\] must be bool", fusion, **given, masks={each.name: bad})
        for bad in (seen.double(), torch.ones(BATCH + 1, dtype=torch.bool), seen[:, None]):
            refused(ShapeError, rf"present\['{each.name}'\] must be bool", fusion, **given, present={each.name: bad})
