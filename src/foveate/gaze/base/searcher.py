"""The base class of models of visual search: a target and an image in, a scanpath out.

The eye goes to the maximum of a priority map (winner takes all). The place or the object that it has seen is closed
from then on (inhibition of return), and the next map follows, until the target is found. A subclass defines the map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.gaze.base.scanpath import Scanpath


class Search(NamedTuple):
    """The course of a search.

    Attributes:
        fixations: `(T, 2)`, x and y of each fixation, the first one included: the column and the row of its pixel.
        maps: `(T - 1, H, W)`, the priority map that decided on each of the others.
        found: whether the last fixation is on the target; False where the call does not say where the target is.
    """

    fixations: Float[Tensor, "t 2"]
    maps: Float[Tensor, "s h w"]
    found: bool

    def scanpath(self, px_per_deg: float | None = None) -> Scanpath:
        """Return the fixations as a scanpath on the image."""
        height, width = self.maps.shape[1:]
        return Scanpath(self.fixations, (height, width), px_per_deg=px_per_deg)


class Searcher(Checked, nn.Module, ABC):
    """A model of where people look while they search for a target.

    Args:
        ior: the side in pixels of the square around a fixation that is seen: the target is found in it, and without
            `objects` it is closed afterwards.
        max_fix: the most fixations, the first one included.
    """

    def __init__(self, ior: int, max_fix: int) -> None:
        super().__init__()
        validate.count("ior", ior, 1)
        validate.count("max_fix", max_fix, 1)
        self.ior, self.max_fix = ior, max_fix

    @torch.no_grad()
    def forward(
        self, target: Float[Tensor, "c h1 w1"], image: Float[Tensor, "c h w"], start: tuple[int, int] | None = None, *,
        goal: Bool[Tensor, "h w"] | None = None, objects: Bool[Tensor, "n h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Search:  # fmt: skip
        """Search an image.

        Args:
            target: an image of the target, `(C, h, w)`.
            image: the image to search, `(C, H, W)`.
            start: the first fixation, (x, y) in pixels; the image's centre by default.
            goal: True for the pixels of the target in the image. The search ends as soon as the square around a
                fixation holds one of them. None: it goes on to the end.
            objects: a mask for each object. Later fixations are on objects only, and an object is fixated once.
            generator: for models that draw at random.

        Returns:
            The search. It ends with the target, after `max_fix` fixations, or when all is closed.

        Raises:
            ShapeError: images, masks or a start that do not fit.
        """
        self._check(target, image, start, goal, objects)
        height, width = image.shape[-2:]
        at = (width // 2, height // 2) if start is None else start
        everywhere = torch.ones(height, width, dtype=torch.bool, device=image.device)
        choices = everywhere if objects is None else objects.any(0)
        seen = ~everywhere
        fixations, maps = [at], []
        with _evaluating(self):
            sought = self._prepare(target)
            while True:
                window = self._window(at, everywhere)
                found = goal is not None and bool((goal & window).any())
                seen = seen | _closed(at, window, objects)
                if found or len(fixations) >= self.max_fix or not (choices & ~seen).any():
                    break
                priority = self._priority(sought, image, at, seen, generator)
                maps.append(priority)
                best = int(priority.masked_fill(seen | ~choices, -torch.inf).argmax())
                at = (best % width, best // width)
                fixations.append(at)
        found_maps = torch.stack(maps) if maps else image.new_zeros(0, height, width)
        return Search(torch.tensor(fixations, dtype=torch.float64), found_maps, found)

    # -- for tests -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """Make a small instance for images of three channels; tests run it."""

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _prepare(self, target: Float[Tensor, "c h w"]) -> Any:
        """Return what is kept of the target for the whole search."""

    @abstractmethod
    def _priority(
        self, sought: Any, image: Float[Tensor, "c h w"], at: tuple[int, int], seen: Bool[Tensor, "h w"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, "h w"]:  # fmt: skip
        """Return the priority of each pixel of the image, from a fixation (x, y); `seen` is closed already.

        The base class takes the largest value that is still open; of equal ones the first, row by row.
        """

    # ------------------------------------------------------------------------------------------------------------------

    def _window(self, at: tuple[int, int], like: Bool[Tensor, "h w"]) -> Bool[Tensor, "h w"]:
        """Return the square around a fixation, cut off at the border."""
        window = torch.zeros_like(like)
        left, top = (max(place - self.ior // 2, 0) for place in at)
        right, bottom = (place - self.ior // 2 + self.ior for place in at)
        window[top:bottom, left:right] = True
        return window

    def _check(
        self, target: Tensor, image: Tensor, start: tuple[int, int] | None, goal: Tensor | None,
        objects: Tensor | None,
    ) -> None:  # fmt: skip
        for name, x in (("target", target), ("image", image)):
            if not isinstance(x, Tensor) or x.dim() != 3 or not x.numel() or not x.is_floating_point():
                raise ShapeError(f"{name} must be one floating point image (C, H, W); got {shown(x)}")
        if target.shape[0] != image.shape[0]:
            raise ShapeError(f"target and image must share channels; got {target.shape[0]} and {image.shape[0]}")
        height, width = image.shape[-2:]
        if goal is not None:
            validate.bool_mask("goal", goal, "H, W", (height, width), image.device)
        if objects is not None:
            count = objects.shape[0] if isinstance(objects, Tensor) and objects.dim() == 3 else 1
            validate.bool_mask("objects", objects, "N, H, W", (count, height, width), image.device)
            if not objects.dim() == 3 or not objects.any():
                raise ShapeError(f"objects must be masks (N, H, W) of at least one pixel; got {shown(objects)}")
        if start is not None and not _is_pixel(start, height, width):
            raise OptionError(f"start={shown(start)} must be (x, y), whole numbers within (W, H)={(width, height)}")


def _is_pixel(start: object, height: int, width: int) -> bool:
    if not isinstance(start, tuple) or len(start) != 2 or not all(type(place) is int for place in start):
        return False
    return 0 <= start[0] < width and 0 <= start[1] < height


def _closed(at: tuple[int, int], window: Tensor, objects: Tensor | None) -> Bool[Tensor, "h w"]:
    """Return the pixels that are closed after a fixation: the window, or every object at the fixation."""
    if objects is None:
        return window
    return objects[objects[:, at[1], at[0]]].any(0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
