"""Convolutions, norms, pooling and resizing of feature maps with one, two or three spatial axes, and stems."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

#: The class for maps with so many spatial axes.
CONV: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d,
}  # fmt: skip

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def halving(channels: int, dim: int) -> nn.Sequential:
    """Make a 3x3 convolution of stride 2 and a batch norm, for images."""
    return nn.Sequential(nn.Conv2d(channels, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))


def quartering(channels: int, dim: int, act: Callable[[], nn.Module] = nn.GELU) -> nn.Sequential:
    """Make two convolutions of stride 2 with batch norms, and an activation between them: the stem of a network."""
    middle = max(1, dim // 2)
    return nn.Sequential(*halving(channels, middle), act(), *halving(middle, dim))


def around(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    """Return the largest value in the neighbourhood of each position, 3 wide along each axis."""
    return _MAX_POOL[x.dim() - 2](x, 3, 1, 1)


def halve(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *half"]:
    """Pool by maxima, with windows of 3 at every second position, as Caffe does.

    The first window starts at the first position, and the last one may reach past the end. A side of n becomes n // 2,
    at least 1.
    """
    window = [min(3, side) for side in x.shape[2:]]
    return _MAX_POOL[x.dim() - 2](x, window, 2, ceil_mode=True)


def resize(x: Float[Tensor, "b c *space"], size: Sequence[int]) -> Float[Tensor, "b c *size"]:
    """Interpolate linearly along each axis; corners stay corners."""
    return F.interpolate(x, tuple(size), mode=_LINEAR[x.dim() - 2], align_corners=True)


def coarse(x: Float[Tensor, "b c *space"], window: Sequence[int]) -> Float[Tensor, "b c *fewer"]:
    """Return the largest value in each window of this size; windows at the end, or on short sides, are smaller."""
    sides = [min(each, side) for each, side in zip(window, x.shape[2:], strict=True)]
    return _MAX_POOL[x.dim() - 2](x, sides, sides, ceil_mode=True)


def tokens(x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b n c"]:
    """Return the positions of a map in a row."""
    return x.flatten(2).mT


def like_map(tokens: Float[Tensor, "b n d"], x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b d *space"]:
    """Return tokens as a map with the positions of x."""
    return tokens.mT.unflatten(2, x.shape[2:])


def mean_and_max(x: Float[Tensor, "b c *space"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Return the mean and the maximum of each channel."""
    flat = x.flatten(2)
    return flat.mean(-1), flat.amax(-1)


def over(weights: Float[Tensor, "b c"], x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *one"]:
    """Return a number for each channel in a shape that broadcasts over the positions of x."""
    return weights[(...,) + (None,) * (x.dim() - 2)]
