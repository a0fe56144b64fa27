"""Squeeze and excitation: each channel is scaled by what all channels are on average over the map.

Squeeze-and-Excitation Networks (2017), arXiv 1709.01507.
"""

from __future__ import annotations

from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import ChannelPerceptron, narrowed
from foveate.nn.parts.spatial import mean_and_max, over


@final
class SqueezeExcitation(FeatureGate):
    """`x * sigmoid(W_2 relu(W_1 s))`, with s the mean of each channel over all positions.

    The usual first gate of a convolutional network: O(N C) for the mean and `2 C² / reduction` weights, with next to no
    arithmetic. All positions share a channel's weight. The wrong choice where the place matters.

    Args:
        channels: C.
        reduction: C over the width between W_1 and W_2; that width is at least 1.
        hidden: the width itself, in the place of `reduction`; timm rounds it to a multiple of 8.
        bias: False leaves out the biases, as the paper's formula does. The release and timm have them.
        dims: number of spatial axes; None for 1, 2 or 3.
    """

    def __init__(
        self, channels: int, reduction: int = 16, *, hidden: int | None = None, bias: bool = True,
        dims: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        self.excite = ChannelPerceptron(channels, narrowed(channels, reduction, hidden), bias=bias)

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c"]:
        """Return the factor of each channel, between 0 and 1."""
        self._check(x)
        return self._weights(x)

    def _weights(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(mean_and_max(x)[0]))

    def _gate(self, x: Tensor) -> Tensor:
        return x * over(self._weights(x), x)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, reduction=2)
