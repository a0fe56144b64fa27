"""Parts that several gates share: a narrow perceptron of channels, and a map from two pools over channels."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.parts.spatial import BATCH_NORM, CONV


def narrowed(channels: int, reduction: int, hidden: int | None, least: int = 1) -> int:
    """Return the width inside a gate: `hidden` if given, else `channels // reduction`, but at least `least`."""
    validate.count("reduction", reduction, 1)
    if hidden is None:
        return max(least, channels // reduction)
    validate.count("hidden", hidden, 1)
    return hidden


def odd(name: str, kernel: int) -> None:
    """Refuse the width of a convolution that has no middle."""
    validate.count(name, kernel, 1)
    if kernel % 2 == 0:
        raise OptionError(f"{name}={kernel} must be odd")


def finite(name: str, value: float) -> float:
    """Return an option that may be any finite number; refuse others."""
    if not math.isfinite(value):
        raise OptionError(f"{name}={value} must be a finite number")
    return float(value)


@final
class ChannelPerceptron(nn.Module):
    """`W_2 relu(W_1 s)` for a vector s of one number for each channel.

    Args:
        channels: C.
        hidden: the width between the two.
        bias: True adds a bias to both.
    """

    def __init__(self, channels: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        self.narrow, self.widen = nn.Linear(channels, hidden, bias), nn.Linear(hidden, channels, bias)

    def forward(self, s: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        return self.widen(F.relu(self.narrow(s)))


@final
class PooledMap(nn.Module):
    """A convolution of two maps, the largest and the mean value of all channels at each position.

    Args:
        kernel: its width along each axis, odd.
        norm: True normalises the result over the batch, without a bias before; the release's momentum is 0.01.
        dims: number of spatial axes.
    """

    def __init__(self, kernel: int = 7, *, norm: bool = True, dims: int = 2) -> None:
        super().__init__()
        odd("kernel", kernel)
        self.conv = CONV[dims](2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = BATCH_NORM[dims](1, momentum=0.01) if norm else nn.Identity()

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b 1 *space"]:
        return self.norm(self.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)))
