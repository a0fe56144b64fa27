"""Tokens on a grid, and depthwise convolutions over it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown

Size = tuple[int, int]  # (H, W)


def sides(option: str, value: int | Size) -> Size:
    """Return the height and the width that one number for both, or two, say.

    Raises:
        OptionError: something else, or numbers below 1.
    """
    both = (value, value) if isinstance(value, int) else value
    if not isinstance(both, tuple | list) or len(both) != 2:
        raise OptionError(f"{option}={shown(value)} must be a whole number, or two of them: (H, W)")
    for side in both:
        validate.count(option, side, 1)
    return both[0], both[1]


def to_map(x: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, "b c h w"]:
    """Reshape tokens, row by row, to an image."""
    return x.mT.unflatten(2, size)


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Reshape an image's pixels, row by row, to tokens."""
    return x.flatten(2).mT


def filled(image: Float[Tensor, "b c *space"], multiple: int) -> Float[Tensor, "b c *filled"]:
    """Fill the sides of a map up to a multiple, with zeros at the end of each axis: at the bottom and on the right."""
    ends = [end for side in reversed(image.shape[2:]) for end in (0, -side % multiple)]
    return F.pad(image, ends) if any(ends) else image


class DepthwiseConv(nn.Module):
    """A depthwise convolution over the grid, with zeros outside: `(B, N, C) -> (B, N, C)`.

    Args:
        dim: C.
        kernel: width and height of the kernel, odd.
        bias: True adds a bias.
    """

    def __init__(self, dim: int, kernel: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("kernel", kernel, 1)
        if kernel % 2 == 0:
            raise OptionError(f"kernel={kernel} must be odd")
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, "b n c"]:
        return to_tokens(self.conv(to_map(x, size)))


def dynamic_conv(x: Float[Tensor, "b n c"], kernels: Float[Tensor, "b c k k"], size: Size) -> Float[Tensor, "b n c"]:
    """Apply a depthwise convolution with kernels `(B, C, K, K)`, K odd, that differ by batch item."""
    batch, n, channels = x.shape
    if kernels.shape[:2] != (batch, channels):
        raise ShapeError(f"kernels must be (B={batch}, C={channels}, K, K); got {tuple(kernels.shape)}")
    images = to_map(x, size).reshape(1, batch * channels, *size)
    out = F.conv2d(images, kernels.flatten(0, 1)[:, None], padding=kernels.shape[-1] // 2, groups=batch * channels)
    return torch.reshape(out, (batch, channels, n)).mT


def local_mass(weights: Float[Tensor, "b h n n"], size: Size, reach: int = 1) -> Float[Tensor, "b h n"]:
    """Return the share of each query's absolute weights within `reach` rows and columns of it."""
    validate.count("reach", reach)
    near = neighbours(size, reach).to(weights.device)
    if near.shape != weights.shape[-2:]:
        got = tuple(weights.shape)
        raise ShapeError(f"weights must be (B, H, N, N) with N = H * W of size={shown(size)}; got {got}")
    mass = weights.abs()
    return (mass * near).sum(-1) / mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)


def neighbours(size: Size, reach: int) -> Tensor:
    """Return a mask `(N, N)` of the tokens of a grid that are at most `reach` rows and columns apart."""
    row, column = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    at = torch.stack([row.flatten(), column.flatten()])
    return ((at[:, :, None] - at[:, None]).abs() <= reach).all(0)
