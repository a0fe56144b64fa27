"""Triplet attention: maps over rows and columns, over channels and columns, and over channels and rows.

Rotate to Attend: Convolutional Triplet Attention Module (2020), arXiv 2010.03045.
"""

from __future__ import annotations

from functools import reduce
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import PooledMap


@final
class TripletAttention(FeatureGate):
    """The mean of `x * sigmoid(conv([max x; mean x]))` over three branches, which pool rows, columns and channels.

    The branch that pools rows has a map of weights over channels and columns, which its convolution sees as an image:
    neighbouring channels and columns interact, with no layer from C to fewer channels. Each branch has `2 kernel²`
    weights, for any C; cost O(N C). The wrong choice if distant positions or channels have to interact, or if the order
    of channels cannot be trained: behind frozen layers.

    Args:
        channels: C.
        kernel: width of the convolutions along each axis, odd.
        spatial: False leaves out the branch that pools channels.
        dims: number of spatial axes, 1, 2 or 3. The paper has 2; for others there is a branch for each axis, and one
            for the channels.
    """

    def __init__(self, channels: int, kernel: int = 7, *, spatial: bool = True, dims: int = 2) -> None:
        super().__init__(channels, dims)
        first = 1 if spatial else 2
        self.pooled = range(first, dims + 2)  # the axes of a map that are pooled, channels first
        self.branches = nn.ModuleList(PooledMap(kernel, dims=dims) for _ in self.pooled)

    def weights(self, x: Float[Tensor, "b c *space"]) -> list[Float[Tensor, "b ..."]]:
        """Return the weights of each branch between 0 and 1, in the shape of x with 1 along the axis that it pools."""
        self._check(x)
        return self._weights(x)

    def _weights(self, x: Tensor) -> list[Tensor]:
        return [
            torch.sigmoid(branch(x.transpose(1, axis))).transpose(1, axis)
            for branch, axis in zip(self.branches, self.pooled, strict=True)
        ]

    def _gate(self, x: Tensor) -> Tensor:
        return x * (reduce(torch.add, self._weights(x)) / len(self.branches))

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, kernel=3, dims=dims)
