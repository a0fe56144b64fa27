"""The attention gate of a U-Net: a coarser map says which positions of a finer one pass.

Attention U-Net: Learning Where to Look for the Pancreas (2018), arXiv 1804.03999.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import narrowed
from foveate.nn.parts.grid import filled
from foveate.nn.parts.spatial import BATCH_NORM, CONV, resize


@final
class AttentionGate(FeatureGate):
    """`a x` with `a = sigmoid(psi relu(W_x x + W_g g))`, one weight for each position, from x and a signal g.

    g is a map from deeper in the network, of any size: it has seen more context, and decides which positions of a skip
    connection go on. Additive attention, computed on the grid of W_x, which strides; a is interpolated linearly back to
    the grid of x. Cost O(N C²). Without a signal x is its own. The wrong choice if positions have to be mixed: it only
    weighs them.

        gate(skip, signal)          # (B, C, H, W) and (B, G, H / 2, W / 2) to (B, C, H, W)

    Args:
        channels: C of x.
        signal_channels: G of the signal; None for C.
        hidden: channels of W_x x and W_g g; None for `C / 2`.
        stride: width and stride of the convolution W_x. Sides that it does not divide are filled up with zeros.
        norm: True puts a batch norm behind W_x, W_g and psi, as later implementations do, with `stride=1`.
        dims: number of spatial axes, 1, 2 or 3; the paper's scans have 3.

    Raises:
        OptionError: no signal where it has to have other channels than x. ShapeError: a signal that does not fit.

    As in the release, `W_g g` is interpolated to the grid of `W_x x`. The release also puts a 1x1 convolution and a
    batch norm behind the product, which the paper's formula has not, and drops what `stride` leaves over of a side.
    """

    def __init__(
        self, channels: int, signal_channels: int | None = None, hidden: int | None = None, *, stride: int = 2,
        norm: bool = False, dims: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        width = narrowed(channels, 2, hidden)
        self.signal_channels = channels if signal_channels is None else signal_channels
        validate.count("signal_channels", self.signal_channels, 1)
        validate.count("stride", stride, 1)
        self.stride, conv = stride, CONV[dims]
        self.of_x = _normed(conv(channels, width, stride, stride, bias=False), norm, dims)
        self.of_signal = _normed(conv(self.signal_channels, width, 1), norm, dims)
        self.psi = _normed(conv(width, 1, 1), norm, dims)

    def forward(
        self, x: Float[Tensor, "b c *space"], signal: Float[Tensor, "b g *coarse"] | None = None
    ) -> Float[Tensor, "b c *space"]:
        """Return the gated map. A map in `channels_last` stays in it.

        Args:
            x: the map.
            signal: g, of any size; None for x itself.
        """
        return self._in_format_of(x, x * self.weights(x, signal))

    def weights(
        self, x: Float[Tensor, "b c *space"], signal: Float[Tensor, "b g *coarse"] | None = None
    ) -> Float[Tensor, "b 1 *space"]:
        """Return the weight of each position, between 0 and 1."""
        self._check(x)
        signal = self._signal(x, signal)
        small = self.of_x(filled(x, self.stride))
        guided = F.relu(small + resize(self.of_signal(signal), small.shape[2:]))
        return resize(torch.sigmoid(self.psi(guided)), x.shape[2:])

    def _gate(self, x: Tensor) -> Tensor:
        return self(x)

    def _signal(self, x: Tensor, signal: Tensor | None) -> Tensor:
        """Return the signal, which is x itself if there is none; refuse one that does not fit."""
        if signal is None and self.signal_channels != self.channels:
            raise OptionError(f"signal must be a map of {self.signal_channels} channels for this gate; got none")
        signal = x if signal is None else signal
        wanted = (x.shape[0], self.signal_channels)
        if not isinstance(signal, Tensor) or signal.dim() != x.dim() or signal.shape[:2] != wanted:
            raise ShapeError(f"signal must be (B={wanted[0]}, {wanted[1]}, *space) as x; got {shown(signal)}")
        if 0 in signal.shape[2:]:
            raise ShapeError(f"signal must have at least one position; got {tuple(signal.shape)}")
        return signal


def _normed(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, norm: bool, dims: int) -> nn.Module:
    return nn.Sequential(conv, BATCH_NORM[dims](conv.out_channels)) if norm else conv
