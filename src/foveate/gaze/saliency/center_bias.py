"""The centre bias: people look at the middle of images, whatever they show. A baseline of saliency models."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.gaze.base.model import GazeModel


@final
class CenterBias(GazeModel):
    """A Gaussian on the image's centre, stretched to the image's sides. It does not see the image.

    Args:
        sigma: the standard deviation, as a share of the image's height and width.
    """

    def __init__(self, sigma: float = 0.25) -> None:
        super().__init__()
        validate.at_least("sigma", sigma, 1e-3)
        self.sigma = sigma

    def _saliency(self, image: Tensor, **given: Tensor) -> Float[Tensor, "b h w"]:
        down, across = (self._profile(side, image) for side in image.shape[-2:])
        return (down[:, None] * across).expand(len(image), -1, -1)

    def _profile(self, side: int, like: Tensor) -> Float[Tensor, " n"]:
        place = (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side - 0.5
        return torch.exp(-0.5 * (place / self.sigma) ** 2)
