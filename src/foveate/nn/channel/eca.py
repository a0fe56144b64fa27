"""Efficient channel attention: a channel is scaled by the means of its neighbours among the channels.

ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks (2019), arXiv 1910.03151.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import odd
from foveate.nn.parts.spatial import mean_and_max, over


@final
class EfficientChannelAttention(FeatureGate):
    """`x * sigmoid(w * s)`: a convolution w along the channels of s, the mean of each channel over all positions.

    It has as many weights as the convolution is wide, and no narrow layer between channels and weights. A channel sees
    only the `kernel` channels around it, zeros beyond the first and the last. The wrong choice if the order of channels
    means nothing and cannot be trained: behind frozen layers.

    Args:
        channels: C.
        kernel: the convolution's width, odd. None for `t = (log2(C) + 1) / 2` without its fraction, and 1 more if that
            is even: 3 for 8 to 127 channels, 5 for 128 to 2047. timm takes at least 3.
        dims: number of spatial axes; None for 1, 2 or 3.
    """

    def __init__(self, channels: int, kernel: int | None = None, *, dims: int | None = None) -> None:
        super().__init__(channels, dims)
        kernel = adaptive_kernel(channels) if kernel is None else kernel
        odd("kernel", kernel)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c"]:
        """Return the factor of each channel, between 0 and 1."""
        self._check(x)
        return self._weights(x)

    def _weights(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(mean_and_max(x)[0][:, None])[:, 0])

    def _gate(self, x: Tensor) -> Tensor:
        return x * over(self._weights(x), x)


def adaptive_kernel(channels: int, gamma: float = 2, shift: float = 1) -> int:
    """Return the odd width that the paper takes for so many channels, from `(log2(channels) + shift) / gamma`."""
    whole = int(abs((math.log2(channels) + shift) / gamma))
    return whole if whole % 2 else whole + 1
