"""The contract that every network of a paper has to keep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.core.catalog import systems
from foveate.core.errors import FoveateError, OptionError, ShapeError, UnknownKey
from foveate.models import Network
from foveate.models.base.network import ImageNetwork
from foveate.nn.parts.cost import cost
from tests.contracts.networks import (
    BATCH,
    CLASSES,
    NETWORKS,
    RELEASED,
    SIZES,
    converted,
    example,
    inputs,
    networks,
)
from tests.support.tensors import assert_near


def test_the_objects_of_the_room_are_networks() -> None:
    objects = [row.load() for row in systems("models")]
    assert len(NETWORKS) > 8
    assert [each.__name__ for each in objects if isinstance(each, type) and issubclass(each, nn.Module)] == [
        each.__name__ for each in objects if each in NETWORKS.values()
    ]


# -- calls -------------------------------------------------------------------------------------------------------------


@networks()
def test_it_runs(name: str) -> None:
    """Different examples give different, finite outputs."""
    out = example(name)(*inputs(name))
    assert out.isfinite().all()
    assert (out[0] - out[-1]).abs().max() > 1e-6


@networks(lambda cls: cls.odd_inputs(BATCH))
def test_odd_sizes(name: str) -> None:
    net = example(name)
    expected = net(*inputs(name)).dim()
    for given in CLASSES[name].odd_inputs(BATCH):
        out = net(*converted(given))
        assert out.isfinite().all() and out.dim() == expected
        assert len(out) == len(given[0])


@networks(lambda cls: cls.batched)
def test_examples_of_a_batch_are_independent(name: str) -> None:
    net = example(name)
    for given in (CLASSES[name].example_inputs(BATCH), *CLASSES[name].odd_inputs(BATCH)):
        given = converted(given)
        together = net(*given)
        for i in range(BATCH):
            assert_near(net(*(x[i : i + 1] for x in given)), together[i : i + 1], 1e-10)


@networks()
def test_eval_mode_is_deterministic_and_changes_nothing(name: str) -> None:
    net, given = example(name), inputs(name)
    before = {key: x.clone() for key, x in net.state_dict().items()}
    kept = tuple(x.clone() for x in given)
    assert torch.equal(net(*given), net(*given))
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True)), "it changes its inputs"


@networks()
def test_every_input_has_an_effect(name: str) -> None:
    """A change of any input changes outputs: of numbers by the gradient, of others by another example's."""
    net, given = example(name), inputs(name)
    out = net(*given)
    for index, x in enumerate(given):
        other = list(given)
        other[index] = x.roll(1, 0) if CLASSES[name].batched or x.is_floating_point() else x[:, : x.shape[1] // 2]
        assert (net(*other) - out).abs().max() > 1e-6, f"input {index}"


@networks(lambda cls: issubclass(cls, ImageNetwork))
def test_features_are_the_maps_of_the_stages(name: str) -> None:
    """The sides of maps fall, examples stay apart, and the output is a function of the last map alone."""
    net, (images,) = example(name), inputs(name)
    assert isinstance(net, ImageNetwork)
    maps = net.features(images)
    sides = [each.shape[2:] for each in maps]
    assert len(maps) > 1 and all(each.shape[0] == BATCH for each in maps)
    assert sides == sorted(sides, reverse=True) and len(set(sides)) == len(sides)
    assert torch.equal(net._classify(maps[-1]), net(images))
    for alone, each in zip(net.features(images[1:2]), maps, strict=True):
        assert_near(alone, each[1:2], 1e-10)
    for wrong in (images[0], images[:, :1], images.tolist()):
        with pytest.raises(ShapeError, match=r"images must be \(B, 2, H, W\); got"):
            net.features(wrong)


# -- gradients, numbers, state -----------------------------------------------------------------------------------------


@networks()
def test_gradients(name: str) -> None:
    """Gradients reach every parameter and the inputs, and say what a step along a random direction does."""
    net, given = example(name), inputs(name)
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
    leaves += [p for p in net.parameters() if p.requires_grad]
    out = net(*given)
    draw = torch.Generator().manual_seed(2)
    toward = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    grads = torch.autograd.grad((out * toward).sum(), leaves, allow_unused=True)
    assert all(grad is not None for grad in grads), "a parameter without a say"
    ways = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in leaves]
    slope, step, ends = sum((g * w).sum() for g, w in zip(grads, ways, strict=True)), 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            moved(leaves, ways, sign * step)
            ends.append((net(*given) * toward).sum())
            moved(leaves, ways, -sign * step)
    assert_near((ends[0] - ends[1]) / (2 * step), torch.as_tensor(slope), 1e-4)


def moved(leaves: list[Tensor], ways: list[Tensor], step: float) -> None:
    for leaf, way in zip(leaves, ways, strict=True):
        leaf += step * way


@networks()
def test_training_mode_trains(name: str) -> None:
    """In training mode one step of gradient descent changes every parameter with a slope."""
    net = example(name).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = net(*inputs(name))
    out.square().mean().backward()
    assert out.isfinite().all()
    parameters = dict(net.named_parameters())
    assert [key for key, p in parameters.items() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters.values())


@networks()
def test_a_state_dict_makes_a_twin(name: str) -> None:
    net, given = example(name), inputs(name)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for x in twin.state_dict().values():
            x.zero_()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(*given), net(*given))


@networks()
def test_a_copy_is_apart(name: str) -> None:
    net, given = example(name), inputs(name)
    out, other = net(*given), copy.deepcopy(net)
    assert torch.equal(other(*given), out)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.5
    assert torch.equal(net(*given), out)


@networks()
def test_dtypes(name: str) -> None:
    """float32 and bfloat16 give what float64 gives with the same, rounded numbers."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
        net = example(name).to(dtype)
        given = inputs(name, dtype)
        out = net(*given)
        assert out.dtype == dtype
        expected = copy.deepcopy(net).double()(*converted(given))
        assert (out.double() - expected).norm() < tolerance * expected.norm()


# -- published sizes and weights ---------------------------------------------------------------------------------------


def on_meta(name: str, size: str) -> Network:
    with torch.device("meta"):
        return NETWORKS[name].of_size(size).eval()


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_parameters_are_as_published(name: str, size: str) -> None:
    net, stated = on_meta(name, size), NETWORKS[name].sizes[size]
    found = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert found > 0
    if stated.parameters is not None:
        assert stated.source, "numbers need a source"
        assert found == pytest.approx(stated.parameters, rel=stated.tolerance)


@pytest.mark.parametrize(("name", "size"), [(n, s) for n, s in SIZES if NETWORKS[n].sizes[s].macs is not None])
def test_multiply_adds_are_as_published(name: str, size: str) -> None:
    stated = NETWORKS[name].sizes[size]
    found = cost(on_meta(name, size), *(torch.empty(1, *shape, device="meta") for shape in stated.inputs))
    assert found.macs == pytest.approx(stated.macs, rel=stated.macs_tolerance)


@pytest.mark.parametrize("name", [name for name, cls in NETWORKS.items() if cls.sizes])
def test_sizes_are_built_by_name(name: str) -> None:
    cls = NETWORKS[name]
    with pytest.raises(UnknownKey, match=f'^unknown size of {name} "giant"; (known|did you mean)'):
        cls.of_size("giant")
    with pytest.raises(OptionError, match='no option "surprising"'):
        cls.of_size(next(iter(cls.sizes)), surprising=1)


@pytest.mark.parametrize("name", RELEASED)
def test_a_release_s_parameters_load(name: str) -> None:
    """The names go one to one, and every number arrives where its name says."""
    make, names = RELEASED[name]
    net, released = make(), {key: torch.zeros(shape) for key, shape in names().items()}
    ours = net.renamed(released)
    assert ours.keys() == net.state_dict().keys()
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in net.state_dict().items()}
    for value, key in enumerate(released):
        released[key] = torch.full_like(released[key], value)
    net.load_released(released)
    where = net.renamed(released)
    assert all(torch.equal(x.double(), where[key].double()) for key, x in net.state_dict().items())


@pytest.mark.parametrize("name", RELEASED)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    make, names = RELEASED[name]
    net, released = make(), {key: torch.zeros(shape) for key, shape in names().items()}
    first, *_ = released
    changes: list[tuple[dict[str, Tensor], str]] = [
        ({key: x for key, x in released.items() if key != first}, "1 missing"),
        ({**released, "surprising.weight": torch.zeros(1)}, "1 unknown \\(surprising.weight\\)"),
        ({**released, first: torch.zeros(2, 3, 4, 5)}, "1 of another shape"),
    ]
    before = {key: x.clone() for key, x in net.state_dict().items()}
    for given, message in changes:
        with pytest.raises(OptionError, match=message) as caught:
            net.load_released(given)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())


@networks(lambda cls: cls.released_names)
def test_released_names_never_merge_two(name: str) -> None:
    net: Any = example(name)
    same = net.renamed(net.state_dict())
    assert same.keys() == net.state_dict().keys(), "our own names stay as they are"


# -- refusals ----------------------------------------------------------------------------------------------------------


@networks()
def test_malformed_inputs_are_refused_in_one_line(name: str) -> None:
    net, given = example(name), inputs(name)
    for index, x in enumerate(given):
        for wrong in (x[..., None], x[0]):
            other = list(given)
            other[index] = wrong
            with pytest.raises(FoveateError) as caught:
                net(*other)
            assert "\n" not in str(caught.value)


@networks()
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f'{CLASSES[name].__name__} has no option "surprising"'):
        CLASSES[name](surprising=1)
