"""CutMix: a box of each image comes from another image, and the labels mix in proportion to the areas.

CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (2019), arXiv 1905.04899.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.train.base.objective import Batch, Criterion, Loss, Objective, inputs_of, labels_of, logits_of


class Mixed(NamedTuple):
    """A mixed batch.

    Args:
        x: the images; each pixel comes from one image.
        y_a, y_b: labels of the images and of their partners.
        lam: the exact share of pixels that is an image's own, in float64; a number, or one for each image.
    """

    x: Float[Tensor, "b c h w"]
    y_a: Tensor
    y_b: Tensor
    lam: Float[Tensor, "*b"]


def cutmix(
    x: Float[Tensor, "b c h w"], y: Tensor, alpha: float = 1.0, p: float = 1.0, *, per_sample: bool = False,
    minmax: tuple[float, float] | None = None, generator: torch.Generator | None = None,
) -> Mixed:  # fmt: skip
    """Mix a batch with a random permutation of itself.

    A share `lam` of Beta(alpha, alpha) is to stay. The box has sides `sqrt(1 - lam)` of the image's and a centre
    uniform over the pixels. What lies outside the image is cut off, and the returned `lam` counts the pixels that stay.

    Args:
        x: images, or feature maps of any layer.
        y: their labels, one or a vector for each.
        alpha: of the beta law; 1 is uniform.
        p: the probability that a batch (with `per_sample`, an image) is mixed: 1 for ImageNet in the paper, 0.5 for
            CIFAR in the release. An unmixed batch is returned as it is.
        per_sample: draw a box for each image; the paper draws one for a batch.
        minmax: bounds of a side's share of the image's. Each side is then uniform between them and the box lies
            inside the image, whatever `alpha`; not in the paper.
        generator: draws it all; None for torch's global one.

    Raises:
        OptionError: an option out of range.
        ShapeError: x is no batch of maps, or has not as many labels.
    """
    _check(alpha, p, minmax)
    if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape:
        raise ShapeError(f"x must be images (B, C, H, W); got {shown(x)}")
    if not isinstance(y, Tensor) or not y.dim() or len(y) != len(x):
        raise ShapeError(f"y must be labels of B={len(x)} images; got {shown(y)}")
    count, random = len(x) if per_sample else 1, _Random(generator)
    partner = random.permutation(len(x)).to(y.device)
    size = (int(x.shape[2]), int(x.shape[3]))
    boxes = random.boxes_between(size, minmax, count) if minmax else random.boxes(size, alpha, count)
    boxes = boxes * (random.uniform(count) < p)[:, None]
    if not boxes.any():
        return Mixed(x, y, y[partner], _kept(boxes, size, per_sample))
    mixed = torch.where(inside(boxes, size).to(x.device), x[partner.to(x.device)], x)
    return Mixed(mixed, y, y[partner], _kept(boxes, size, per_sample))


def cutmix_loss(
    logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Float[Tensor, "*b"] | float, criterion: Criterion = F.cross_entropy
) -> Float[Tensor, ""]:
    """Return `lam criterion(logits, y_a) + (1 - lam) criterion(logits, y_b)`, the mean over the batch.

    With a `lam` for each image, the criterion has to take `reduction="none"`, as those of PyTorch do.
    """
    own, other = _shares(logits, y_a, y_b, torch.as_tensor(lam), criterion)
    return own + other


def cut_box(size: tuple[int, int], lam: Float[Tensor, " n"], centre: Int[Tensor, "n 2"]) -> Int[Tensor, "n 4"]:
    """Return the boxes `(top, bottom, left, right)` for shares that are to stay, cut off at the image's edges.

    As in the release, a side is rounded down to an even number of pixels.
    """
    sides = torch.tensor(size)
    half = (sides * (1.0 - lam)[:, None].sqrt()).long() // 2
    first, last = ((centre + step).clamp(min=0).minimum(sides) for step in (-half, half))
    return torch.stack([first, last], 2).flatten(1)


def inside(boxes: Int[Tensor, "n 4"], size: tuple[int, int]) -> Tensor:
    """Return True for the pixels of each box, `(N, 1, H, W)`."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side) for side in size)
    return (((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None])[:, None]


@final
class CutMix(Objective):
    """The loss of mixed images: a classifier sees part of an object only, and all pixels carry evidence.

    It spreads evidence over the object, so that occluded images are recognised better. A step costs what a plain one
    does, and training takes more of them. The wrong choice where small details decide the class, which a box may hide.

    Args:
        p, alpha, per_sample, minmax, generator: see `cutmix`. The generator is the objective's only state.
        key: the input that holds the images; None takes "pixel_values", or the only input of four dimensions.
        at: the name of a module whose output is mixed in place of the images, such as "layer1"; None for the images.
        criterion: the loss of logits and labels; see `cutmix_loss`.
    """

    def __init__(
        self, p: float = 1.0, alpha: float = 1.0, *, per_sample: bool = False,
        minmax: tuple[float, float] | None = None, key: str | None = None, at: str | None = None,
        criterion: Criterion = F.cross_entropy, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(criterion)
        _check(alpha, p, minmax)
        self.options: dict[str, Any] = dict(p=p, alpha=alpha, per_sample=per_sample, minmax=minmax)
        self.key, self.at, self.generator = key, at, generator

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        inputs, labels = inputs_of(batch), labels_of(batch)
        if self.at is None:
            name = _image_input(inputs, self.key)
            mixed = self._mix(inputs[name], labels)
            outputs = model(**inputs | {name: mixed.x})
        else:
            outputs, mixed = self._through(model, inputs, labels)
        own, other = _shares(logits_of(outputs), mixed.y_a, mixed.y_b, mixed.lam, self.criterion)
        return Loss.of(outputs, own=own, other=other)

    def _mix(self, x: Tensor, y: Tensor) -> Mixed:
        return cutmix(x, y, **self.options, generator=self.generator)

    def _through(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Any, Mixed]:
        """Run the model with the output of the module `at` mixed."""
        modules, found = dict(model.named_modules()), list[Mixed]()
        if self.at not in modules:
            raise OptionError(f"at={shown(self.at)} must name a module of the model, such as {list(modules)[-1]!r}")

        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            found.append(self._mix(out, labels))
            return found[0].x

        handle = modules[self.at].register_forward_hook(hook)
        try:
            outputs = model(**inputs)
        finally:
            handle.remove()
        if len(found) != 1:
            raise OptionError(f"at={shown(self.at)} must name a module that runs once; it ran {len(found)} times")
        return outputs, found[0]

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Batch]:
        random = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        batch = {"input": torch.randn(6, 1, 8, 8, generator=random), "labels": torch.arange(6) % 3}
        return cls(generator=random), net, batch


class _Random:
    """Draws of a mix, on the CPU and in float64, from a generator on any device."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.given: dict[str, Any] = dict(generator=generator, device="cpu" if generator is None else generator.device)

    def uniform(self, count: int) -> Float[Tensor, " n"]:
        return torch.rand(count, dtype=torch.float64, **self.given).cpu()

    def permutation(self, count: int) -> Int[Tensor, " n"]:
        return torch.randperm(count, **self.given).cpu()

    def beta(self, alpha: float, count: int) -> Float[Tensor, " n"]:
        """Draw from Beta(alpha, alpha). PyTorch's own draw takes no generator; numpy's is seeded by it."""
        seed = int(torch.randint(1 << 62, (), **self.given))
        return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count))

    def below(self, bounds: Int[Tensor, "n k"]) -> Int[Tensor, "n k"]:
        """Draw whole numbers from 0 to below each bound."""
        return (torch.rand(bounds.shape, dtype=torch.float64, **self.given).cpu() * bounds).long()

    def boxes(self, size: tuple[int, int], alpha: float, count: int) -> Int[Tensor, "n 4"]:
        lam = self.beta(alpha, count)
        return cut_box(size, lam, self.below(torch.tensor(size).expand(count, 2)))

    def boxes_between(self, size: tuple[int, int], share: tuple[float, float], count: int) -> Int[Tensor, "n 4"]:
        sides = torch.tensor(size).expand(count, 2)
        least, most = ((sides * bound).long() for bound in share)
        length = least + self.below(most - least + 1)
        first = self.below(sides - length + 1)
        return torch.stack([first, first + length], 2).flatten(1)


def _kept(boxes: Int[Tensor, "n 4"], size: tuple[int, int], per_sample: bool) -> Float[Tensor, "*n"]:
    """Return the share of pixels outside each box."""
    top, bottom, left, right = boxes.unbind(1)
    lam = 1.0 - ((bottom - top) * (right - left)).double() / (size[0] * size[1])
    return lam if per_sample else lam[0]


def _shares(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Return the two parts of the loss."""
    if lam.dim():
        each = [criterion(logits, y, reduction="none") for y in (y_a, y_b)]
        lam = lam.to(each[0])
        return (lam * each[0]).mean(), ((1 - lam) * each[1]).mean()
    kept = float(lam)
    return kept * criterion(logits, y_a), (1 - kept) * criterion(logits, y_b)


def _image_input(inputs: dict[str, Any], key: str | None) -> str:
    """Return the name of the input that holds the images."""
    maps = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() == 4]
    if key is None:
        if "pixel_values" in maps or len(maps) == 1:
            return "pixel_values" if "pixel_values" in maps else maps[0]
        raise OptionError(f"key=None needs one input of four dimensions; the batch has {', '.join(maps) or 'none'}")
    if key not in maps:
        raise OptionError(f"key={key!r} must name an input (B, C, H, W); the batch has {', '.join(maps) or 'none'}")
    return key


def _check(alpha: float, p: float, minmax: tuple[float, float] | None) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise OptionError(f"alpha={shown(alpha)} must be a number above 0")
    validate.between("p", p, 0, 1)
    if minmax is None:
        return
    if not isinstance(minmax, tuple) or len(minmax) != 2 or not 0 <= minmax[0] <= minmax[1] <= 1:
        raise OptionError(f"minmax={shown(minmax)} must be two shares (least, most) in 0..1, or None")
