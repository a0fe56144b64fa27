"""The convolutional block attention module: a weight for each channel, and then one for each position.

CBAM: Convolutional Block Attention Module (2018), arXiv 1807.06521.
"""

from __future__ import annotations

from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import ChannelPerceptron, PooledMap, narrowed
from foveate.nn.parts.spatial import mean_and_max, over


@final
class CBAM(FeatureGate):
    """`y = x * sigmoid(MLP(mean) + MLP(max))`, and then `y * sigmoid(conv([max_c y; mean_c y]))`.

    Mean and maximum of each channel over all positions go through one perceptron, so that a channel can be weighed by
    a single strong position. The second factor sees the largest and the mean channel at each position. Cost O(N) for
    the convolution and O(N C) for the pools. The wrong choice if positions have to be compared over a distance: the
    map of positions sees `kernel` of them along each axis.

    Args:
        channels: C.
        reduction: C over the perceptron's hidden width, which is at least 1.
        hidden: the width itself, in the place of `reduction`.
        kernel: width of the convolution along each axis, odd.
        bias: False leaves the biases out of the perceptron, as the paper's formula and timm do; the release has them.
        norm: False leaves out the batch norm behind the convolution, which the release and timm have and the formula
            has not.
        dims: number of spatial axes, 1, 2 or 3.
    """

    def __init__(
        self, channels: int, reduction: int = 16, *, hidden: int | None = None, kernel: int = 7, bias: bool = True,
        norm: bool = True, dims: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        self.channel = ChannelPerceptron(channels, narrowed(channels, reduction, hidden), bias=bias)
        self.spatial = PooledMap(kernel, norm=norm, dims=dims)

    def weights(self, x: Float[Tensor, "b c *space"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b 1 *space"]]:
        """Return the factor of each channel, and then that of each position, all between 0 and 1."""
        self._check(x)
        channels = self._channels(x)
        return channels, self._positions(x * over(channels, x))

    def _channels(self, x: Tensor) -> Tensor:
        mean, largest = mean_and_max(x)
        return torch.sigmoid(self.channel(mean) + self.channel(largest))

    def _positions(self, y: Tensor) -> Tensor:
        return torch.sigmoid(self.spatial(y))

    def _gate(self, x: Tensor) -> Tensor:
        y = x * over(self._channels(x), x)
        return y * self._positions(y)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, reduction=2, kernel=3, dims=dims)
