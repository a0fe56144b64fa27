"""The base class of saliency models: an image in, a density over its pixels out.

A subclass defines `_saliency`. The base class checks the call, brings the map to the image's size and makes it a
density.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown
from foveate.gaze.base.density import SaliencyMap, as_density


class GazeModel(Checked, nn.Module, ABC):
    """A model of the places in images that people look at.

    Attributes:
        channels: C, the channels of an image; None for any number.
    """

    channels: int | None = None

    def forward(self, image: Float[Tensor, "b c h w"], **given: Tensor) -> Float[Tensor, "b h w"]:
        """Return the densities of a batch of images; each adds up to 1.

        Args:
            image: `(B, C, H, W)`.
            given: what else the model depends on, by name, such as a task or the viewer's head.

        Raises:
            ShapeError: a malformed image.
        """
        self._check(image)
        scores = self._saliency(image, **given)
        if scores.shape[-2:] != image.shape[-2:]:
            size = tuple(image.shape[-2:])
            scores = F.interpolate(scores[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return as_density(scores)

    @torch.no_grad()
    def predict(self, image: Float[Tensor, "c h w"], **given: Tensor) -> SaliencyMap:
        """Return one image's density, without gradients; `given` without the batch's axis."""
        batch = {name: value[None] for name, value in given.items()}
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise ShapeError(f"image must be one image (C, H, W); got {shown(image)}")
        return SaliencyMap(self(image[None], **batch)[0])

    # -- for tests -----------------------------------------------------------------------------------------------------

    @classmethod
    def example(cls) -> Self:
        """Make a small instance in which the mechanism has an effect; tests run it."""
        return cls()

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _saliency(self, image: Tensor, **given: Tensor) -> Float[Tensor, "b h w"]:
        """Return non-negative scores of any resolution; a model with logits takes their softmax."""

    def _check(self, image: Tensor) -> None:
        channels = "C" if self.channels is None else f"C={self.channels}"
        if not isinstance(image, Tensor) or image.dim() != 4 or not image.numel() or not image.is_floating_point():
            raise ShapeError(f"image must be floating point (B, {channels}, H, W); got {shown(image)}")
        if self.channels not in (None, image.shape[1]):
            raise ShapeError(f"image must be (B, {channels}, H, W); got {shown(image)}")
