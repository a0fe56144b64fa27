"""Saliency maps as densities over the pixels of an image, and the pixels that fixations lie in.

A position is (x, y) in pixels, with (0, 0) at the image's top left corner. The pixel in row i and column j covers
`j <= x < j + 1` and `i <= y < i + 1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown


def as_density(scores: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Divide maps by their sums, so that each adds up to 1.

    A map with negative values is first raised until its least value is 0. A map of zeros becomes uniform.
    """
    low = scores.amin((-2, -1), keepdim=True)
    raised = scores - low.clamp(max=0)
    total = raised.sum((-2, -1), keepdim=True)
    flat = torch.full_like(raised, 1 / (raised.shape[-2] * raised.shape[-1]))
    return torch.where(total > 0, raised / total.where(total > 0, 1), flat)


@dataclass(frozen=True, eq=False)
class SaliencyMap:
    """A probability density over the pixels of one image.

    Args:
        density: `(H, W)`, values of at least 0 that add up to 1.

    Raises:
        ShapeError: the density is not a floating point map `(H, W)`.
        OptionError: its values are not those of a density.
    """

    density: Float[Tensor, "h w"]

    def __post_init__(self) -> None:
        check_map("density", self.density)
        total = self.density.double().sum().item()
        if not (self.density >= 0).all() or abs(total - 1) > 1e-4:
            raise OptionError(
                f"density must be at least 0 and add up to 1; it adds up to {total:.6g}; SaliencyMap.from_scores "
                "makes a density of any map"
            )

    @classmethod
    def from_scores(cls, scores: Float[Tensor, "h w"]) -> Self:
        """Make the density that is proportional to a map; one with negative values is raised to 0 first."""
        check_map("scores", scores)
        return cls(as_density(scores.double()))

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "h w"]) -> Self:
        """Make the softmax of a map over all its pixels."""
        check_map("logits", logits)
        return cls(torch.softmax(logits.double().flatten(), 0).view_as(logits))

    @classmethod
    def uniform(cls, size: tuple[int, int]) -> Self:
        """Make the uniform density over an image of `size` (H, W)."""
        return cls.from_scores(torch.ones(size, dtype=torch.float64))

    @property
    def size(self) -> tuple[int, int]:
        """The image's (H, W)."""
        height, width = self.density.shape
        return height, width

    def log_density(self) -> Float[Tensor, "h w"]:
        """Return the natural logarithm; -inf where the density is 0."""
        return self.density.log()

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
        """Draw positions (x, y): the centres of pixels, each as often as its density says."""
        drawn = torch.multinomial(self.density.flatten(), count, replacement=True, generator=generator)
        return torch.stack([drawn % self.size[1], drawn // self.size[1]], 1) + 0.5


#: Maps that measures take: any scores, or a density.
Map = Tensor | SaliencyMap


def check_map(name: str, value: object) -> None:
    """Refuse what is not a map `(H, W)` of finite numbers."""
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.numel() or not value.is_floating_point():
        raise ShapeError(f"{name} must be a floating point map (H, W); got {shown(value)}")
    if not value.isfinite().all():
        raise OptionError(f"{name} must be finite; it has {int((~value.isfinite()).sum())} pixels of NaN or inf")


def values(name: str, given: Map) -> Float[Tensor, "h w"]:
    """Return a map's values in float64."""
    found = given.density if isinstance(given, SaliencyMap) else given
    check_map(name, found)
    return found.detach().double()


def fixated(
    saliency: Map, fixations: Float[Tensor, "n 2"]
) -> tuple[Float[Tensor, "h w"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return a map's values, and the rows and columns of at least one fixation."""
    found = values("saliency", saliency)
    height, width = found.shape
    rows, columns = pixels("fixations", fixations, (height, width))
    if not len(rows):
        raise OptionError("fixations must have at least one; an image without any has no score")
    return found, rows, columns


def check_positions(name: str, xy: object) -> None:
    """Refuse what is not a list of finite positions `(N, 2)`."""
    if not isinstance(xy, Tensor) or xy.dim() != 2 or xy.shape[1] != 2 or xy.is_complex() or xy.dtype == torch.bool:
        raise ShapeError(f"{name} must be positions (N, 2) of x and y; got {shown(xy)}")
    if not xy.isfinite().all():
        raise OptionError(f"{name} must be finite; fixations that were not recorded have to be left out")


def pixels(name: str, xy: Tensor, size: tuple[int, int]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the rows and columns of the pixels that positions lie in; a position outside the image is refused."""
    check_positions(name, xy)
    columns, rows = xy.floor().long().unbind(1)
    outside = (rows < 0) | (rows >= size[0]) | (columns < 0) | (columns >= size[1])
    if outside.any():
        x, y = xy[outside][0].tolist()
        raise OptionError(f"{name} must lie within the image (H, W)={tuple(size)}; got (x, y)=({x:.6g}, {y:.6g})")
    return rows, columns
