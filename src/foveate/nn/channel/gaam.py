"""Gaussian adaptive attention: learned Gaussians around the mean weigh features.

Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities (2024),
arXiv 2401.11143.
"""

from __future__ import annotations

import math
from typing import Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.scoring import safe_softmax
from foveate.nn.base.feature_gate import FeatureGate

EPS = 1e-8


@final
class GaussianAdaptiveAttention(nn.Module):
    """`x * softmax_i(-sum_m z_mi² / 2 c_m²)`: a gate along one axis, with `z_m = (x - mean - delta_m) / deviation`.

    It has no queries and no keys, and only mean, variance and the sum of weights pass between entries: along the axis
    of features it treats each token alone. Cost O(n G); parameters 2 G per head. The wrong choice if tokens have to
    read each other, and along time in causal models, since a weight depends on the whole chunk.

    Args:
        heads: chunks of the axis, each with its own Gaussians; the last one takes the remainder.
        gaussians: G; their product, not their sum, is the weight.
        axis: the axis of statistics and weights, which add up to 1 in each chunk; n entries, at least 2 a chunk.
        padding_value: entries that equal it are padding and pass unchanged.
        variant: "paper" excludes padding from mean, variance and the sum of weights, and needs no floor. "release"
            counts padding as zeros in mean and variance and with its own value in the weights, and floors the sum of
            densities at 1e-8: many or wide Gaussians then give weights near 0.

    Raises:
        OptionError: an option out of range. ShapeError: chunks of fewer than two entries.

    Offsets start at 0, and spreads at the exponential of normal numbers, as in the repository; the package of the same
    name starts them at the normal numbers themselves. The normalizer of a Gaussian is the same for all entries and
    cancels, except in the release's floor.
    """

    def __init__(
        self, heads: int = 4, gaussians: int = 5, axis: int = -1, padding_value: float | None = None, *,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("gaussians", gaussians, 1)
        validate.one_of("variant", variant, ("paper", "release"))
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise OptionError(f"axis={shown(axis)} must be a whole number")
        self.heads, self.axis, self.padding_value, self.variant = heads, axis, padding_value, variant
        self.offsets = nn.Parameter(torch.zeros(heads, gaussians))
        self.spreads = nn.Parameter(torch.randn(heads, gaussians).exp())

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Multiply x by its weights; the shape stays."""
        return self.gated(x) if self.padding_value is None else torch.where(self.real(x), self.gated(x), x)

    def gated(self, x: Tensor) -> Tensor:
        return x * self.weights(x)

    def real(self, x: Tensor) -> Bool[Tensor, "..."]:
        """Return a mask of the entries that are not padding."""
        return torch.ones_like(x, dtype=torch.bool) if self.padding_value is None else x != self.padding_value

    def weights(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the factors on x, in its shape; along the axis each chunk adds up to 1 (0 if all is padding)."""
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] // self.heads < 2:
            raise ShapeError(
                f"x {tuple(x.shape)} must have at least 2 entries for each of {self.heads} heads along axis {self.axis}"
            )
        rows, real = x.movedim(self.axis, -1), self.real(x).movedim(self.axis, -1)
        size = x.shape[self.axis] // self.heads
        sizes = [size] * (self.heads - 1) + [x.shape[self.axis] - size * (self.heads - 1)]
        chunks = zip(rows.split(sizes, -1), real.split(sizes, -1), self.offsets, self.spreads, strict=True)
        return torch.cat([self._chunk(*chunk) for chunk in chunks], -1).movedim(-1, self.axis)

    def _chunk(
        self, x: Float[Tensor, "*b n"], real: Bool[Tensor, "*b n"], offsets: Float[Tensor, " g"],
        spreads: Float[Tensor, " g"],
    ) -> Float[Tensor, "*b n"]:  # fmt: skip
        """Return the weights of one head."""
        release = self.variant == "release"
        known = torch.where(real, x, 0.0)
        count = torch.full_like(x[..., :1], x.shape[-1]) if release else real.sum(-1, keepdim=True).to(x.dtype)
        mean = known.sum(-1, keepdim=True) / count.clamp(min=1)
        away = known - mean if release else torch.where(real, x - mean, 0.0)
        deviation = (away.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1) + EPS).sqrt()
        z = ((x if release else known) - mean)[..., None] - offsets
        log = -((z / deviation[..., None]).square() / (2 * spreads.square())).sum(-1)
        if release:
            log = log - 0.5 * (2 * math.pi * spreads.square()).log().sum()
            return (log - log.logsumexp(-1, keepdim=True).clamp(min=math.log(EPS))).exp()
        return safe_softmax(log.masked_fill(~real, -math.inf))


@final
class GaussianBlock(nn.Module):
    """`x + gate_l(x)`, one gate after the other, for an encoder's output, as in a Gaussian adaptive transformer.

    With variant="paper" padding stays unchanged; the release doubles it in each layer. Args are those of
    `GaussianAdaptiveAttention`, and `layers`.
    """

    def __init__(
        self, layers: int = 3, heads: int = 4, gaussians: int = 5, axis: int = -1,
        padding_value: float | None = None, *, variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("layers", layers, 1)
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(heads, gaussians, axis, padding_value, variant=variant) for _ in range(layers)
        )
        self.variant = variant

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        real = None
        for layer in self.layers:
            assert isinstance(layer, GaussianAdaptiveAttention)
            real = layer.real(x) if real is None else real
            x = x + layer(x) if self.variant == "release" else torch.where(real, x + layer.gated(x), x)
        return x


@final
class GaussianGate(FeatureGate):
    """`GaussianAdaptiveAttention` over the channels of each position of a feature map.

    Args:
        channels: C, at least 2 for each head.
        heads, gaussians, variant: see `GaussianAdaptiveAttention`.
        dims: number of spatial axes; None for 1, 2 or 3.

    Raises:
        OptionError: fewer than two channels for a head.
    """

    def __init__(
        self, channels: int, heads: int = 4, gaussians: int = 5, *, dims: int | None = None,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        self.attention = GaussianAdaptiveAttention(heads, gaussians, axis=1, variant=variant)
        if channels < 2 * heads:
            raise OptionError(f"heads={heads} must be at most channels / 2 = {channels // 2}")

    def _gate(self, x: Tensor) -> Tensor:
        return self.attention(x)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, heads=2, gaussians=3, dims=dims)


def importance_factor(weights: Float[Tensor, "..."], axis: int = -1) -> Float[Tensor, " n"]:
    """Return the mean weight of each of the n entries along the axis over all data, scaled to 0..1.

    It is 0 everywhere if all mean weights are equal.
    """
    mean = weights.movedim(axis, -1).flatten(0, -2).mean(0)
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low) if high > low else torch.zeros_like(mean)
