"""Scanpaths, and the fixations that many people made on many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.gaze.base.density import SaliencyMap, check_positions, pixels


@dataclass(frozen=True, eq=False)
class Scanpath:
    """One person's fixations on one image, in order.

    Args:
        fixations: `(T, 2)`, x and y in pixels from the image's top left corner.
        size: the image's (H, W) in pixels.
        durations: `(T,)`, seconds; None if they are unknown.
        px_per_deg: pixels per degree of visual angle; None if it is unknown.
        subject: who looked.

    Raises:
        ShapeError: fixations or durations of another shape.
        OptionError: a fixation that is not finite, a negative duration, a size or a scale that is not positive.
    """

    fixations: Float[Tensor, "t 2"]
    size: tuple[int, int]
    durations: Float[Tensor, " t"] | None = None
    px_per_deg: float | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        check_positions("fixations", self.fixations)
        check_size(self.size)
        if self.durations is not None:
            _check_durations(self.durations, len(self.fixations))
        if self.px_per_deg is not None and not self.px_per_deg > 0:
            raise OptionError(f"px_per_deg={self.px_per_deg} must be over 0, or None")

    @classmethod
    def from_degrees(
        cls, degrees: Float[Tensor, "t 2"], size: tuple[int, int], px_per_deg: float,
        durations: Float[Tensor, " t"] | None = None, subject: str | None = None,
    ) -> Self:  # fmt: skip
        """Make a scanpath of positions in degrees from the image's centre, x to the right and y down."""
        check_positions("degrees", degrees)
        return cls(degrees * px_per_deg + _centre(size, degrees), size, durations, px_per_deg, subject)

    def __len__(self) -> int:
        return len(self.fixations)

    def degrees(self) -> Float[Tensor, "t 2"]:
        """Return the fixations in degrees from the image's centre, x to the right and y down."""
        if self.px_per_deg is None:
            raise OptionError("degrees need px_per_deg, pixels per degree of visual angle")
        return (self.fixations - _centre(self.size, self.fixations)) / self.px_per_deg

    def saccades(self) -> Float[Tensor, "s 2"]:
        """Return the steps from each fixation to the next, in pixels."""
        return self.fixations.diff(dim=0)

    def is_inside(self) -> bool:
        """Return whether every fixation lies within the image."""
        height, width = self.size
        x, y = self.fixations.unbind(1)
        return bool(((x >= 0) & (x < width) & (y >= 0) & (y < height)).all())


@dataclass(frozen=True, eq=False)
class Fixations:
    """The fixations on several images, each within its image.

    Args:
        xy: `(N, 2)`, x and y in pixels.
        image: `(N,)`, the index of the image that each fixation lies on.
        sizes: `(M, 2)`, whole numbers, (H, W) of each image.

    Raises:
        ShapeError: arguments whose shapes do not fit.
        OptionError: an index of no image, or a fixation outside its image.
    """

    xy: Float[Tensor, "n 2"]
    image: Int[Tensor, " n"]
    sizes: Int[Tensor, "m 2"]

    def __post_init__(self) -> None:
        check_positions("xy", self.xy)
        for name, value, shape in (("image", self.image, (len(self.xy),)), ("sizes", self.sizes, (len(self.sizes), 2))):
            if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != shape:
                raise ShapeError(f"{name} must be int64 {shape}; got {shown(value)}")
        if len(self.image) and not 0 <= int(self.image.min()) <= int(self.image.max()) < len(self.sizes):
            raise OptionError(f"image must be in 0..{len(self.sizes) - 1}, an index of sizes {tuple(self.sizes.shape)}")
        for index in self.image.unique().tolist():
            pixels("xy", self.of(index), self.size(index))

    @classmethod
    def of_scanpaths(cls, scanpaths: Sequence[Scanpath], image: Sequence[int]) -> Self:
        """Join scanpaths; `image` says for each the index of its image."""
        if not scanpaths or len(image) != len(scanpaths):
            raise ShapeError(f"image must have an index for each of the {len(scanpaths)} scanpaths; got {len(image)}")
        sizes = torch.ones(max(image) + 1, 2, dtype=torch.int64)
        known: dict[int, tuple[int, int]] = {}
        for index, path in zip(image, scanpaths, strict=True):
            if known.setdefault(index, path.size) != path.size:
                raise OptionError(f"scanpaths on image {index} must agree on its size: {known[index]} and {path.size}")
            sizes[index] = torch.tensor(path.size)
        counts = torch.tensor([len(path) for path in scanpaths])
        every = torch.cat([path.fixations for path in scanpaths])
        return cls(every, torch.tensor(image).repeat_interleave(counts), sizes)

    def __len__(self) -> int:
        return len(self.xy)

    def size(self, index: int) -> tuple[int, int]:
        """Return an image's (H, W)."""
        height, width = self.sizes[index].tolist()
        return height, width

    def of(self, index: int) -> Float[Tensor, "n 2"]:
        """Return the fixations on an image."""
        return self.xy[self.image == index]

    def elsewhere(self, index: int) -> Float[Tensor, "n 2"]:
        """Return the fixations on all other images, scaled to this image's size: the negatives of shuffled AUC."""
        others = self.image != index
        scale = self.sizes[index] / self.sizes[self.image[others]]
        return self.xy[others] * scale.flip(1).to(self.xy.dtype)

    def counts(self, index: int) -> Float[Tensor, "h w"]:
        """Return how many fixations lie in each pixel of an image."""
        rows, columns = pixels("xy", self.of(index), self.size(index))
        found = torch.zeros(self.size(index), dtype=torch.float64)
        return found.index_put_((rows, columns), torch.ones(len(rows), dtype=torch.float64), accumulate=True)

    def density(self, index: int, sigma: float) -> SaliencyMap:
        """Return the empirical saliency map: a Gaussian of `sigma` pixels on each fixation, cut off at the border.

        It is taken at the centres of pixels and divided by its sum. About one degree of visual angle is customary.
        """
        validate.at_least("sigma", sigma, 1e-3)
        height, width = self.size(index)
        x, y = self.of(index).double().unbind(1)
        if not len(x):
            raise OptionError(f"image {index} has no fixation, and so no density; take SaliencyMap.uniform")
        across = _bell(torch.arange(width) + 0.5 - x[:, None], sigma)
        down = _bell(torch.arange(height) + 0.5 - y[:, None], sigma)
        return SaliencyMap.from_scores(down.T @ across)


def check_size(size: object) -> None:
    """Refuse what is not an image's (H, W)."""
    if not isinstance(size, tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ShapeError(f"size={shown(size)} must be (H, W), two whole numbers over 0")


def _check_durations(durations: object, count: int) -> None:
    if not isinstance(durations, Tensor) or tuple(durations.shape) != (count,):
        raise ShapeError(f"durations must be ({count},), one for each fixation; got {shown(durations)}")
    if not (durations.isfinite() & (durations >= 0)).all():
        raise OptionError("durations must be seconds of at least 0")


def _centre(size: tuple[int, int], like: Tensor) -> Float[Tensor, "2"]:
    check_size(size)
    return torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64).to(like.dtype)


def _bell(distance: Tensor, sigma: float) -> Tensor:
    return torch.exp(-0.5 * (distance / sigma) ** 2)
