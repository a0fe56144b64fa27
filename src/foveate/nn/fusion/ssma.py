"""The fusion block of self-supervised model adaptation: each channel of two streams is weighed at each position.

Self-Supervised Model Adaptation for Multimodal Semantic Segmentation (2018), arXiv 1808.03833.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.nn.base.fusion import Fusion, Stream
from foveate.nn.parts.gating import narrowed
from foveate.nn.parts.spatial import over


@final
class SSMAFusion(Fusion):
    """`conv(S [a; b])` with `S = sigmoid(conv3x3(relu(conv3x3([a; b]))))`: one weight for each channel and position.

    Both streams of maps, such as colour and depth, decide together what passes of each, so that one can stand in where
    the other is bad. Nothing but the loss of the task teaches S, hence "self-supervised". Cost `18 (2 C)² / reduction`
    weights for S. The wrong choice if the streams are not aligned: each position sees 5 x 5 of both.

    Streams are `a` and `b`, `(B, H, W, C)`; the output is `fused`, `(B, H, W, C)`. What is masked or missing counts as
    zeros, as beyond the border.

    Args:
        channels: C of a stream.
        reduction: 2 C over the width between the two convolutions. The release has 16 for its deepest maps (C = 256)
            and 6 for skip connections (C = 24).
        out: the last convolution: "conv1x1_bn", with a batch norm, as for the deepest maps; "conv3x3", as for skip
            connections.
    """

    def __init__(
        self, channels: int, reduction: int = 16, *, out: Literal["conv1x1_bn", "conv3x3"] = "conv1x1_bn"
    ) -> None:
        validate.count("channels", channels, 1)
        validate.one_of("out", out, ("conv1x1_bn", "conv3x3"))
        axes = ("H", "W")
        super().__init__([Stream("a", channels, axes), Stream("b", channels, axes)], [Stream("fused", channels, axes)])
        both = 2 * channels
        width = narrowed(both, reduction, None)
        self.narrow, self.widen = nn.Conv2d(both, width, 3, padding=1), nn.Conv2d(width, both, 3, padding=1)
        if out == "conv1x1_bn":
            self.out: nn.Module = nn.Sequential(nn.Conv2d(both, channels, 1, bias=False), nn.BatchNorm2d(channels))
        else:
            self.out = nn.Conv2d(both, channels, 3, padding=1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")

    def weights(
        self, a: Float[Tensor, "b h w c"], b: Float[Tensor, "b h w c"]
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b h w c"]]:
        """Return the weights of a and those of b, between 0 and 1."""
        self._check({"a": a, "b": b})
        of_a, of_b = self._weights(_joined(a, b)).movedim(1, -1).chunk(2, -1)
        return of_a, of_b

    def _weights(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.widen(F.relu(self.narrow(x))))

    def _fuse(self, x: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, Tensor]:
        both = _joined(x["a"], x["b"])
        return {"fused": self.out(both * self._weights(both)).movedim(1, -1)}

    @classmethod
    def example(cls) -> Self:
        return cls(4, reduction=2)


@final
class SkipGate(nn.Module):
    """`x relu(BN(W m))`, with m the mean of each channel of a signal: the decoder weighs channels of a skip connection.

    Maps have one, two or three spatial axes, and x and the signal any sizes. In training a batch needs at least two
    examples, for BN.

    Args:
        channels: C of x.
        signal_channels: G of the signal, the decoder's map.
    """

    def __init__(self, channels: int = 24, signal_channels: int = 256) -> None:
        super().__init__()
        validate.count("channels", channels, 1)
        validate.count("signal_channels", signal_channels, 1)
        self.weigh, self.norm = nn.Linear(signal_channels, channels, bias=False), nn.BatchNorm1d(channels)

    def forward(
        self, x: Float[Tensor, "b c *space"], signal: Float[Tensor, "b g *coarse"]
    ) -> Float[Tensor, "b c *space"]:
        """Return the weighed map.

        Raises:
            ShapeError: maps of other channels, or of two batches.
        """
        for name, given, channels in (("x", x, self.norm.num_features), ("signal", signal, self.weigh.in_features)):
            if not isinstance(given, Tensor) or given.dim() < 3 or given.shape[:2] != (len(x), channels):
                raise ShapeError(f"{name} must be (B, {channels}, *space), with one B for both; got {shown(given)}")
        return x * over(F.relu(self.norm(self.weigh(signal.flatten(2).mean(-1)))), x)


def _joined(a: Float[Tensor, "b h w c"], b: Float[Tensor, "b h w c"]) -> Float[Tensor, "b d h w"]:
    return torch.cat([a, b], -1).movedim(-1, 1)
