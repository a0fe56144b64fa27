"""The contract that every model of saliency and of visual search has to keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate.gaze
from foveate.core.errors import OptionError, ShapeError
from foveate.gaze import GazeModel, SaliencyMap, Search, Searcher, auc_judd, information_gain
from tests.contracts.gaze import MODELS, SEARCHERS, SIZES, grid_of_objects, image, model, searcher

EVERY_MODEL = pytest.mark.parametrize("key", MODELS)
EVERY_SEARCHER = pytest.mark.parametrize("key", SEARCHERS)
EVERY_SIZE = pytest.mark.parametrize("size", SIZES)


def search(key: str, size: tuple[int, int] = SIZES[1], seed: int = 0, **options: object) -> Search:
    generator = torch.Generator().manual_seed(seed)
    found = searcher(key)(image((12, 12), 1), image(size), generator=generator, **options)
    assert isinstance(found, Search)
    return found


def test_every_public_class_is_here() -> None:
    public = [getattr(foveate.gaze, name) for name in dir(foveate.gaze) if not name.startswith("_")]
    for base, listed in ((GazeModel, MODELS), (Searcher, SEARCHERS)):
        assert {cls for cls in public if isinstance(cls, type) and issubclass(cls, base)} - {base} == set(
            listed.values()
        )


# -- saliency models ---------------------------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_SIZE
def test_an_image_gives_a_density_of_its_size(key: str, size: tuple[int, int]) -> None:
    images = torch.stack([image(size, seed) for seed in range(3)])
    found = model(key)(images)
    assert found.shape == (3, *size) and found.dtype == images.dtype
    assert (found >= 0).all()
    assert torch.allclose(found.sum((1, 2)), torch.ones(3), atol=1e-5)
    assert found.std((1, 2)).min() > 0, "a flat map tells nothing"


@EVERY_MODEL
def test_images_of_a_batch_are_independent(key: str) -> None:
    images = torch.stack([image(SIZES[1], seed) for seed in range(3)])
    net = model(key)
    assert torch.allclose(net(images)[1:2], net(images[1:2]), atol=1e-6)
    assert torch.equal(net(images), net(images))


@EVERY_MODEL
def test_a_prediction_is_a_saliency_map_without_gradients(key: str) -> None:
    net = model(key)
    found = net.predict(image(SIZES[1]).requires_grad_())
    assert isinstance(found, SaliencyMap) and found.size == SIZES[1] and not found.density.requires_grad
    places = torch.tensor([[20.0, 15.0], [30.5, 10.2]])
    assert 0 <= auc_judd(found, places) <= 1
    assert information_gain(found, places, found) == 0


@EVERY_MODEL
def test_a_model_trains_where_it_has_parameters(key: str) -> None:
    net = model(key)
    parameters = list(net.parameters())
    if parameters:
        found = net(image(SIZES[0])[None])
        grads = torch.autograd.grad(found[0, 3, 4].log(), parameters, allow_unused=True)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


@EVERY_MODEL
@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).long(), torch.zeros(1, 3, 0, 8), "x"])
def test_malformed_images_are_refused(key: str, bad: Tensor) -> None:
    with pytest.raises(ShapeError, match="image must be floating point"):
        model(key)(bad)


@EVERY_MODEL
def test_a_prediction_is_of_one_image(key: str) -> None:
    with pytest.raises(ShapeError, match="image must be one image"):
        model(key).predict(image(SIZES[0])[None])


# -- searchers ---------------------------------------------------------------------------------------------------------


@EVERY_SEARCHER
@EVERY_SIZE
def test_a_search_stays_in_the_image(key: str, size: tuple[int, int]) -> None:
    found = search(key, size)
    count = searcher(key).max_fix
    assert found.fixations.shape == (count, 2) and found.maps.shape == (count - 1, *size)
    assert found.fixations[0].tolist() == [size[1] // 2, size[0] // 2]
    assert found.scanpath(30.0).is_inside() and found.scanpath(30.0).size == size
    assert torch.equal(found.fixations, found.fixations.round())
    assert not found.found
    assert found.maps.isfinite().all() and all(each.std() > 0 for each in found.maps)


@EVERY_SEARCHER
def test_each_fixation_is_the_largest_value_that_is_open(key: str) -> None:
    """The squares around earlier fixations are closed."""
    found, side = search(key), searcher(key).ior
    for step, priority in enumerate(found.maps):
        still_open = torch.ones_like(priority, dtype=torch.bool)
        for x, y in found.fixations[: step + 1].long().tolist():
            left, top = x - side // 2, y - side // 2
            still_open[max(top, 0) : top + side, max(left, 0) : left + side] = False
        x, y = found.fixations[step + 1].long().tolist()
        assert still_open[y, x] and priority[y, x] == priority[still_open].max()


@EVERY_SEARCHER
def test_objects_are_fixated_once(key: str) -> None:
    size = (36, 48)
    objects = grid_of_objects(size)
    net = searcher(key)
    net.max_fix = 100
    start = (0, 0)  # on no object
    found = net(image((12, 12), 1), image(size), start, objects=objects, generator=torch.Generator().manual_seed(0))
    x, y = found.fixations[1:].long().unbind(1)
    visited = objects[:, y, x]
    assert (visited.sum(0) == 1).all(), "every fixation after the first is on an object"
    assert (visited.sum(1) == 1).all() and len(x) == len(objects)


@EVERY_SEARCHER
def test_an_object_at_the_start_is_not_fixated_again(key: str) -> None:
    size = (36, 48)
    objects = grid_of_objects(size)
    net = searcher(key)
    net.max_fix = 100
    found = net(image((12, 12), 1), image(size), objects=objects, generator=torch.Generator().manual_seed(0))
    x, y = found.fixations.long().unbind(1)
    assert (objects[:, y, x].sum(1) == 1).all() and len(x) == len(objects)


@EVERY_SEARCHER
def test_it_ends_with_the_target(key: str) -> None:
    whole = search(key, (36, 48))
    x, y = whole.fixations[2].long().tolist()
    goal = torch.zeros(36, 48, dtype=torch.bool)
    goal[y, x] = True
    found = search(key, (36, 48), goal=goal)
    assert found.found and len(found.fixations) <= 3
    x, y = found.fixations[-1].long().tolist()
    side = searcher(key).ior
    assert goal[max(y - side // 2, 0) : y - side // 2 + side, max(x - side // 2, 0) : x - side // 2 + side].any()
    at_once = search(key, (36, 48), goal=torch.ones(36, 48, dtype=torch.bool))
    assert at_once.found and len(at_once.fixations) == 1 and at_once.maps.shape == (0, 36, 48)
    nowhere = search(key, (36, 48), goal=torch.zeros(36, 48, dtype=torch.bool))
    assert not nowhere.found and len(nowhere.fixations) == searcher(key).max_fix


@EVERY_SEARCHER
def test_the_square_is_as_large_as_said(key: str) -> None:
    """Its first row and column belong to it, and those at a whole side from them do not."""
    side, size, start = searcher(key).ior, (36, 48), (20, 15)
    first = (start[0] - side // 2, start[1] - side // 2)
    for x, y, is_seen in (
        (*first, True), (first[0] + side - 1, first[1] + side - 1, True),
        (first[0] - 1, first[1], False), (first[0], first[1] - 1, False),
        (first[0] + side, first[1], False), (first[0], first[1] + side, False),
    ):  # fmt: skip
        goal = torch.zeros(size, dtype=torch.bool)
        goal[y, x] = True
        net = searcher(key)
        net.max_fix = 1
        assert net(image((12, 12), 1), image(size), start, goal=goal).found == is_seen


@EVERY_SEARCHER
def test_it_ends_when_all_is_closed(key: str) -> None:
    net = searcher(key)
    net.ior, net.max_fix = 200, 50
    found = net(image((12, 12), 1), image((36, 48)), generator=torch.Generator().manual_seed(0))
    assert len(found.fixations) == 1 and not found.found


@EVERY_SEARCHER
def test_a_seed_decides_everything(key: str) -> None:
    one, two = search(key, seed=5), search(key, seed=5)
    assert torch.equal(one.fixations, two.fixations) and torch.equal(one.maps, two.maps)
    state = torch.get_rng_state()
    search(key)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@EVERY_SEARCHER
def test_the_start_matters_and_is_the_first_fixation(key: str) -> None:
    found = search(key, start=(3, 30))
    assert found.fixations[0].tolist() == [3, 30]


@EVERY_SEARCHER
def test_no_gradient_and_no_mode_is_left(key: str) -> None:
    net = searcher(key).train()
    scene = image(SIZES[0]).requires_grad_()
    found = net(image((12, 12), 1).requires_grad_(), scene, generator=torch.Generator().manual_seed(0))
    assert not found.maps.requires_grad and not found.fixations.requires_grad
    assert all(module.training for module in net.modules())
    assert scene.grad is None and all(x.grad is None for x in net.parameters())


@EVERY_SEARCHER
def test_inputs_are_left_as_they_were(key: str) -> None:
    target, scene, objects = image((12, 12), 1), image((36, 48)), grid_of_objects((36, 48))
    before = [x.clone() for x in (target, scene, objects)]
    searcher(key)(target, scene, objects=objects, generator=torch.Generator().manual_seed(0))
    for x, was in zip((target, scene, objects), before, strict=True):
        assert torch.equal(x, was)


@EVERY_SEARCHER
@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (dict(target=torch.zeros(1, 3, 8, 8)), ShapeError, "target must be one floating point image"),
        (dict(image=torch.zeros(3, 16, 16).long()), ShapeError, "image must be one floating point image"),
        (dict(target=torch.zeros(1, 8, 8)), ShapeError, "share channels; got 1 and 3"),
        (dict(start=(16, 3)), OptionError, r"start=\(16, 3\) must be \(x, y\).*within \(W, H\)=\(16, 20\)"),
        (dict(start=(1.5, 3)), OptionError, "whole numbers within"),
        (dict(goal=torch.zeros(16, 20, dtype=torch.bool)), ShapeError, r"goal must be bool \(H, W\)=\(20, 16\)"),
        (dict(goal=torch.zeros(20, 16)), ShapeError, "goal must be bool"),
        (dict(objects=torch.ones(20, 16, dtype=torch.bool)), ShapeError, "objects must be"),
        (dict(objects=torch.zeros(2, 20, 16, dtype=torch.bool)), ShapeError, "of at least one pixel"),
        (dict(objects=torch.ones(2, 16, 20, dtype=torch.bool)), ShapeError, r"objects must be bool \(N, H, W\)"),
    ],
)
def test_malformed_searches_are_refused(key: str, given: dict[str, object], error: type[Exception], says: str) -> None:
    call: dict[str, object] = {"target": torch.zeros(3, 8, 8), "image": torch.zeros(3, 20, 16)}
    with pytest.raises(error, match=says):
        searcher(key)(**call | given, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["ior", "max_fix"])
def test_wrong_sizes_are_refused(name: str) -> None:
    cls = SEARCHERS["random"]
    for value in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match=f"{name}={value}"):
            cls(**{name: value})


def test_a_random_search_needs_a_generator() -> None:
    with pytest.raises(OptionError, match="generator=None"):
        searcher("random")(image((8, 8)), image((20, 20)))


def test_a_random_search_finds_its_target_halfway() -> None:
    """Of N objects of one size, it takes (N + 1) / 2 fixations on objects, on average."""
    objects, counts = grid_of_objects((32, 32), 4), []
    net = SEARCHERS["random"](ior=1, max_fix=100)
    generator = torch.Generator().manual_seed(0)
    for trial in range(400):
        found = net(
            image((8, 8)), image((32, 32)), (0, 0), goal=objects[trial % 16], objects=objects, generator=generator
        )
        counts.append(len(found.fixations) - 1)
    assert abs(sum(counts) / 400 - 8.5) < 0.7
    assert set(counts) == set(range(1, 17))
