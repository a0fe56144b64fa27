"""CutMix: its boxes and their law, the loss, and classifiers of digits that are robust to occlusion."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import FoveateError, OptionError, ShapeError
from foveate.train.base.objective import Objective
from foveate.train.objectives.cutmix import CutMix, _kept, _Random, cut_box, cutmix, cutmix_loss, inside


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, *size: int) -> Tensor:
    """Return images that hold their own number at every pixel."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 2, *size).clone()


# -- boxes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"minmax": (0.2, 0.9)}, {"alpha": 0.3}])
def test_each_pixel_comes_from_one_image_and_lam_counts_them(options: dict) -> None:
    x, y, random, mixed_images = numbered(4, 13, 10), torch.arange(4), seeded(), 0
    for _ in range(250):
        mixed = cutmix(x, y, generator=random, **options)
        assert torch.equal(mixed.y_a, y)
        lam = mixed.lam.expand(4)
        for i in range(4):
            own, other = mixed.x[i] == i, mixed.x[i] == mixed.y_b[i]
            assert (own | other).all(), "no pixel is blended"
            if mixed.y_b[i] != i:
                assert abs(own.double().mean() - lam[i]) < 1e-9
                mixed_images += 0 < lam[i] < 1
        assert sorted(mixed.y_b.tolist()) == [0, 1, 2, 3], "partners are a permutation"
    assert mixed_images > 400
    assert torch.equal(x, numbered(4, 13, 10)), "the given images stay"


def test_boxes_by_the_release_s_formula() -> None:
    """`int(W sqrt(1 - lam))`, half of it to each side of the centre, clipped to the image."""
    random = seeded()
    lam, centre = torch.rand(300, generator=random).double(), torch.randint(0, 9, (300, 2), generator=random)
    lam[:2] = torch.tensor([0.0, 1.0])
    boxes = cut_box((13, 9), lam, centre)
    for i in range(300):
        expected = []
        for side, at in zip((13, 9), centre[i].tolist(), strict=True):
            cut = int(side * math.sqrt(1 - lam[i]))
            expected += [min(max(at - cut // 2, 0), side), min(max(at + cut // 2, 0), side)]
        assert boxes[i].tolist() == expected
        drawn = torch.zeros(13, 9, dtype=torch.bool)
        drawn[expected[0] : expected[1], expected[2] : expected[3]] = True
        assert torch.equal(inside(boxes, (13, 9))[i, 0], drawn)


def test_clipping_leaves_more_of_an_image_than_was_drawn(claim) -> None:
    """The mean is `1 - E[(r - r²/4)²]` with r² uniform: 1/2 + 1/5 - 1/48 = 0.679."""
    boxes = _Random(seeded()).boxes((224, 224), 1.0, 20_000)
    assert abs(_kept(boxes, (224, 224), True).mean() - 0.679) < 0.01
    centres = (boxes[:, :2] + boxes[:, 2:]).double()
    assert abs(centres.mean() / 2 - 112) < 4
    wide = _kept(_Random(seeded(1)).boxes((64, 256), 1.0, 20_000), (64, 256), True)
    assert abs(wide.mean() - 0.679) < 0.02
    claim(
        "the share of an image that stays, where a uniform share was drawn: mean of 20,000 boxes on 224 by 224",
        ours=_kept(boxes, (224, 224), True).mean().item(), baseline=0.5, better="higher", margin=0.15,
        baseline_name="the share that was drawn", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_follow_the_beta_law(alpha: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    drawn = _Random(seeded(2)).beta(alpha, 4000)
    assert stats.kstest(drawn.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_sides_between_bounds_lie_inside_the_image() -> None:
    boxes = _Random(seeded()).boxes_between((20, 30), (0.25, 0.75), 3000)
    top, bottom, left, right = boxes.T
    assert top.min() == 0 and bottom.max() == 20 and left.min() == 0 and right.max() == 30
    assert {*(bottom - top).tolist()} == set(range(5, 16))
    assert {*(right - left).tolist()} == set(range(7, 23))


def test_a_box_for_each_image_or_for_the_batch() -> None:
    x, y = numbered(16, 12, 12), torch.arange(16)
    whole, each = cutmix(x, y, generator=seeded(1)), cutmix(x, y, generator=seeded(1), per_sample=True)
    assert whole.lam.shape == () and each.lam.shape == (16,)
    assert len(set(each.lam.tolist())) > 8
    changed = (whole.x != x).any(1)
    moved = whole.y_b != y
    assert (changed[moved] == changed[moved][0]).all(), "one box"
    halves = cutmix(numbered(400, 4, 4), torch.arange(400), p=0.3, per_sample=True, generator=seeded())
    assert 0.1 < (halves.lam < 1).double().mean() < 0.3


def test_batches_are_mixed_with_the_given_probability() -> None:
    x, y, random = numbered(4, 16, 16), torch.arange(4), seeded()
    unmixed = [cutmix(x, y, p=0.5, generator=random).x is x for _ in range(400)]
    full = [cutmix(x, y, p=1.0, generator=random).x is x for _ in range(400)]
    assert 0.45 < sum(unmixed) / 400 < 0.6, "half of them, and those whose box has no pixel"
    assert sum(full) / 400 < 0.06


def test_without_probability_nothing_changes() -> None:
    x, y = numbered(4, 8, 8), torch.arange(4)
    mixed = cutmix(x, y, p=0.0, generator=seeded())
    assert mixed.x is x and mixed.lam == 1
    logits = torch.randn(4, 4, generator=seeded())
    assert torch.equal(cutmix_loss(logits, *mixed[1:]), F.cross_entropy(logits, y))


def test_an_image_that_is_its_own_partner_stays() -> None:
    x = torch.randn(1, 3, 8, 8, generator=seeded())
    for seed in range(20):
        assert torch.equal(cutmix(x, torch.tensor([3]), generator=seeded(seed)).x, x)


def test_a_generator_decides() -> None:
    x, y = torch.randn(6, 1, 8, 8, generator=seeded()), torch.arange(6)
    first, same, other = (cutmix(x, y, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.x, same.x) and torch.equal(first.y_b, same.y_b)
    assert not torch.equal(first.x, other.x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.equal(cutmix(x, y).x, first.x), "torch's global generator, if none is given"


def test_images_of_whole_numbers_are_mixed() -> None:
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    assert cutmix(x, torch.arange(4), generator=seeded()).x.dtype == torch.uint8


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_weighs_both_labels_by_their_areas() -> None:
    logits = torch.randn(5, 3, generator=seeded())
    y_a, y_b = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 1, 0, 2, 2])
    a, b = (F.cross_entropy(logits, y, reduction="none") for y in (y_a, y_b))
    torch.testing.assert_close(cutmix_loss(logits, y_a, y_b, 0.3), (0.3 * a + 0.7 * b).mean())
    lam = torch.tensor([0.1, 0.9, 1.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(cutmix_loss(logits, y_a, y_b, lam), (lam.float() * a + (1 - lam.float()) * b).mean())
    assert torch.equal(cutmix_loss(logits, y_a, y_b, 1.0), F.cross_entropy(logits, y_a))

    def smoothed(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=0.1, reduction=reduction)

    expected = 0.3 * smoothed(logits, y_a) + 0.7 * smoothed(logits, y_b)
    torch.testing.assert_close(cutmix_loss(logits, y_a, y_b, 0.3, smoothed), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_objective_is_the_loss_of_mixed_images(per_sample: bool) -> None:
    _, net, batch = CutMix.example()
    loss = CutMix(per_sample=per_sample, generator=seeded())(net, batch)
    mixed = cutmix(batch["input"], batch["labels"], per_sample=per_sample, generator=seeded())
    torch.testing.assert_close(loss.total, cutmix_loss(net(mixed.x), *mixed[1:]))
    assert loss.parts.keys() == {"own", "other"}
    unmixed = CutMix(p=0.0, generator=seeded())(net, batch)
    assert torch.equal(unmixed.total, F.cross_entropy(net(batch["input"]), batch["labels"]))
    assert unmixed.parts["other"] == 0


def test_features_of_a_layer_are_mixed() -> None:
    _, net, batch = CutMix.example()
    loss = CutMix(at="0", generator=seeded())(net, batch)
    mixed = cutmix(net[0](batch["input"]), batch["labels"], generator=seeded())
    torch.testing.assert_close(loss.total, cutmix_loss(net[1:](mixed.x), *mixed[1:]))
    with pytest.raises(OptionError, match="at='nowhere' must name a module of the model, such as '4'"):
        CutMix(at="nowhere")(net, batch)
    twice = nn.Sequential(net[0], nn.Conv2d(4, 1, 1), net[0], *net[1:])
    with pytest.raises(OptionError, match="at='0' must name a module that runs once; it ran 2 times"):
        CutMix(at="0", generator=seeded())(twice, batch)
    assert not net[0]._forward_hooks


class Named(nn.Module):
    """A classifier with two inputs of four dimensions."""

    def forward(self, pixel_values: Tensor, depth: Tensor | None = None) -> Tensor:
        return pixel_values.mean((2, 3)) + (0 if depth is None else depth.mean((2, 3)))


def test_the_images_are_found_among_the_inputs() -> None:
    x, y = torch.randn(4, 3, 8, 8, generator=seeded()), torch.arange(4) % 3
    net, batch = Named(), {"pixel_values": x, "depth": 0 * x, "labels": y}
    mixed = cutmix(x, y, generator=seeded())
    torch.testing.assert_close(CutMix(generator=seeded())(net, batch).total, cutmix_loss(net(mixed.x), *mixed[1:]))
    by_depth = CutMix(key="depth", generator=seeded())(net, {**batch, "pixel_values": 0 * x, "depth": x})
    torch.testing.assert_close(by_depth.total, cutmix_loss(net(mixed.x), *mixed[1:]))
    for objective, given, message in (
        (CutMix(key="image"), batch, "key='image' must name an input .* the batch has pixel_values, depth"),
        (CutMix(), {"a": x, "b": x, "labels": y}, "key=None needs one input of four dimensions; the batch has a, b"),
        (CutMix(), {"a": y, "labels": y}, "key=None needs one input of four dimensions; the batch has none"),
    ):
        with pytest.raises(OptionError, match=message):
            objective(net, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha=0 must be a number above 0"),
        ({"alpha": math.inf}, "alpha=inf must be a number above 0"),
        ({"p": 1.5}, r"p=1.5 must be in 0..1"),
        ({"minmax": (0.6, 0.2)}, r"minmax=\(0.6, 0.2\) must be two shares"),
        ({"minmax": (0.2, 1.2)}, r"minmax=\(0.2, 1.2\) must be two shares"),
        ({"minmax": 0.5}, "minmax=0.5 must be two shares"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CutMix(**options)
    with pytest.raises(OptionError, match=message):
        cutmix(numbered(2, 4, 4), torch.arange(2), **options)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 4, 4), torch.arange(2), r"x must be images \(B, C, H, W\); got Tensor \(2, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), torch.arange(0), "x must be images"),
        (torch.zeros(2, 1, 4, 4), torch.arange(3), r"y must be labels of B=2 images; got Tensor \(3,\)"),
        (torch.zeros(2, 1, 4, 4), torch.tensor(1), "y must be labels of B=2"),
    ],
)
def test_bad_batches_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        cutmix(x, y)
    assert "\n" not in str(caught.value) and isinstance(caught.value, FoveateError)


# -- digits ------------------------------------------------------------------------------------------------------------

SIDE, TRAIN = 16, 300


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 300 digits to train on and 600 to test on, at 16 by 16 pixels, in 0..1."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = map(torch.tensor, datasets.load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, (SIDE, SIDE), mode="bilinear")
    order = torch.randperm(len(labels), generator=seeded())
    train, test = order[:TRAIN], order[TRAIN : TRAIN + 600]
    return images[train], labels[train], images[test], labels[test]


class SmallCNN(nn.Module):
    """Three convolutions, the mean over the map, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class CutOut(Objective):
    """The baseline: the same boxes are black, and the labels stay."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.random = _Random(generator)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        boxes = self.random.boxes((SIDE, SIDE), 1.0, 1)
        return self.plain(model, {**batch, "x": batch["x"].masked_fill(inside(boxes, (SIDE, SIDE)), 0.0)})


@cache
def trained(kind: str, seed: int, epochs: int) -> nn.Module:
    images, labels, _, _ = digits()
    random = seeded(seed)
    objective: Any = {"cutmix": CutMix(generator=random), "cutout": CutOut(random), "none": CutMix(p=0.0)}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallCNN()
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=epochs * 6)
    order = seeded(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(TRAIN, generator=order).split(50):
            optimiser.zero_grad()
            objective(net, {"x": images[chosen], "labels": labels[chosen]}).total.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def occluded(images: Tensor, share: float = 0.4) -> Tensor:
    """Return images with a black square of this share of the area, at a place from a seed."""
    side, random = round(SIDE * math.sqrt(share)), seeded(7)
    first = torch.randint(0, SIDE - side + 1, (len(images), 2), generator=random)
    boxes = torch.stack([first, first + side], 2).flatten(1)
    return images.masked_fill(inside(boxes, (SIDE, SIDE)), 0.0)


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor) -> float:
    return (net(images).argmax(-1) == digits()[3]).float().mean().item()


def compare(claim: Any, seeds: tuple[int, ...], epochs: int, *, margin: float) -> None:
    nets = {kind: [trained(kind, seed, epochs) for seed in seeds] for kind in ("cutmix", "none")}

    def mean(kind: str, images: Tensor) -> float:
        return float(np.mean([accuracy(net, images) for net in nets[kind]]))

    clean = digits()[2]
    where = f"300 digits, {epochs} epochs, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    claim(
        f"accuracy with 40 % of the image hidden: {where}",
        ours=mean("cutmix", occluded(clean)), baseline=mean("none", occluded(clean)), better="higher", margin=margin,
        baseline_name="no augmentation", seed=seeds[0],
    )  # fmt: skip


def test_hidden_digits_are_recognised(claim) -> None:
    compare(claim, (0,), 20, margin=0.03)


@pytest.mark.slow
def test_hidden_digits_are_recognised_over_seeds(claim) -> None:
    compare(claim, (0, 1, 2, 3, 4), 40, margin=0.02)


@pytest.mark.slow
def test_boxes_of_other_images_teach_more_than_black_ones(claim) -> None:
    seeds, clean = (0, 1, 2, 3, 4), digits()[2]
    ours, theirs = (
        float(np.mean([accuracy(trained(kind, seed, 40), clean) for seed in seeds])) for kind in ("cutmix", "cutout")
    )
    claim(
        "accuracy of 600 digits after 300, 40 epochs, 5 seeds",
        ours=ours, baseline=theirs, better="higher", baseline_name="Cutout with the same boxes", seed=0,
    )  # fmt: skip
