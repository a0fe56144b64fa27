"""The small classifier of images: its tokens are patches at their places, and it refuses other images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.core.errors import OptionError, ShapeError
from foveate.models.base.image_encoder import ImageEncoder
from foveate.nn import MultiHeadAttention
from tests.support.tensors import assert_near


def encoder(**options: Any) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(3, 8, 5, [MultiHeadAttention(16, 2), MultiHeadAttention(16, 2)], **options)


@pytest.mark.parametrize(("patch", "causal"), [(2, False), (4, True)])
def test_each_patch_is_a_token_at_its_place(patch: int, causal: bool) -> None:
    net, images = encoder(patch=patch, causal=causal), torch.rand(2, 3, 8, 8)
    side = 8 // patch
    x = torch.stack(
        [
            net.embed(images[:, :, y : y + patch, x : x + patch].flatten(1))
            + net.places[y // patch * side + x // patch]
            for y in range(0, 8, patch)
            for x in range(0, 8, patch)
        ],
        1,
    )
    for block in net.blocks:
        x = block(x, causal=causal)
    assert_near(net(images), net.head(net.norm(x).mean(1)), 1e-5)


def test_places_begin_small() -> None:
    assert encoder(patch=1).places.std().item() == pytest.approx(0.02, rel=0.1)


def test_other_images_and_sizes_are_refused() -> None:
    for shape in ((2, 1, 8, 8), (2, 3, 8, 6), (3, 8, 8)):
        with pytest.raises(ShapeError, match=r"images must be \(B, 3, 8, 8\)"):
            encoder()(torch.zeros(shape))
    with pytest.raises(OptionError, match="patch=3 must divide side=8"):
        encoder(patch=3)
    with pytest.raises(OptionError, match=r"got widths \[16, 8\]"):
        ImageEncoder(1, 8, 5, [MultiHeadAttention(16, 2), MultiHeadAttention(8, 2)])
    with pytest.raises(OptionError, match=r"got widths \[\]"):
        ImageEncoder(1, 8, 5, [])
