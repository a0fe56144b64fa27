"""The base class of saliency models: sizes, densities, and what a model is given besides the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import ShapeError
from foveate.gaze import GazeModel, SaliencyMap, as_density
from tests.support.tensors import assert_near


class Coarse(GazeModel):
    """A map of half the image's resolution, brighter where the image is, times a factor for each image."""

    channels = 3

    def _saliency(self, image: Tensor, **given: Tensor) -> Tensor:
        scores = F.avg_pool2d(image.mean(1), 2)
        return scores ** given["power"][:, None, None] if "power" in given else scores


def image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_coarse_maps_are_resized_linearly() -> None:
    x = image(2, 3, 6, 8)
    scores = F.avg_pool2d(x.mean(1), 2)[:, None]
    expected = F.interpolate(scores, (6, 8), mode="bilinear", align_corners=False)[:, 0]
    assert_near(Coarse()(x), expected / expected.sum((1, 2), keepdim=True), 1e-12)
    assert Coarse()(image(1, 3, 7, 9)).shape == (1, 7, 9)


def test_a_model_may_be_given_more_than_an_image() -> None:
    x, power = image(2, 3, 6, 8), torch.tensor([1.0, 4.0])
    whole = Coarse()(x, power=power)
    assert_near(whole[:1], Coarse()(x[:1]), 1e-12)
    assert not torch.allclose(whole[1:], Coarse()(x[1:]))
    assert_near(Coarse().predict(x[1], power=power[1]).density, whole[1], 1e-12)


def test_channels_are_checked() -> None:
    with pytest.raises(ShapeError, match=r"image must be \(B, C=3, H, W\); got"):
        Coarse()(image(1, 1, 6, 8))


def test_densities_of_a_batch_keep_gradients_and_precision() -> None:
    scores = image(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(as_density, scores)
    found = as_density(torch.stack([image(4, 5).float(), torch.zeros(4, 5), image(4, 5).float() - 2]))
    assert found.dtype == torch.float32
    assert_near(found.sum((1, 2)), torch.ones(3), 1e-6)
    assert_near(found[1], torch.full((4, 5), 1 / 20), 1e-7)
    assert found[2].min() == 0
    assert SaliencyMap(found[0]).size == (4, 5)
