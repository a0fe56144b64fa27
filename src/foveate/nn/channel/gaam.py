"""Gaussian adaptive attention: features weighed by learned Gaussians around their mean.

Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities (2024),
arXiv 2401.11143.
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.scoring import safe_softmax

EPS = 1e-8


@final
class GaussianAdaptiveAttention(nn.Module):
    """`x * softmax_i(-sum_m z_mi² / 2 c_m²)`: a gate along one axis, with `z_m = (x - mean - delta_m) / deviation`.

    No queries, no keys, and nothing passes between entries but mean, variance and the sum of weights: with the axis of
    features it treats each token alone. Cost O(n G); parameters 2 G per head. The wrong choice where tokens have to
    read each other, and in causal models along time: a weight there knows the whole chunk.

    Args:
        heads: chunks that the axis is cut into, each with Gaussians of its own; the last one takes what is left over.
        gaussians: G; their product, not their sum, is the weight.
        axis: along which statistics are taken and weights add up to 1 (in each chunk); n entries, at least 2 a chunk.
        padding_value: entries that equal it are padding and pass as they are.
        variant: "paper" keeps padding out of mean, variance and the sum of weights, and needs no floor. "release"
            counts it as zeros in mean and variance and as it is in the weights, and lets densities add up to 1e-8 at
            least: many or wide Gaussians then weigh everything down to 0.

    Raises:
        OptionError: an option out of range. ShapeError: chunks of fewer than two entries.

    Offsets start at 0, and spreads at the exponential of normal numbers (as in the repository; the package of the same
    name starts them at the normal numbers themselves). The normaliser of a Gaussian is the same for all entries and
    cancels, but for the release's floor.
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
        """x, weighed; its shape is kept."""
        return self.gated(x) if self.padding_value is None else torch.where(self.real(x), self.gated(x), x)

    def gated(self, x: Tensor) -> Tensor:
        return x * self.weights(x)

    def real(self, x: Tensor) -> Bool[Tensor, "..."]:
        """Which entries are not padding."""
        return torch.ones_like(x, dtype=torch.bool) if self.padding_value is None else x != self.padding_value

    def weights(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What x is multiplied by, in its shape; along the axis each chunk adds up to 1 (0 where all is padding)."""
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
        """Weights of one head."""
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
    """`x + gate_l(x)`, one gate after the other: what a Gaussian adaptive transformer puts on an encoder's output.

    With variant="paper" padding stays what it is; the release doubles it in each layer. Args are those of
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


def importance_factor(weights: Float[Tensor, "..."], axis: int = -1) -> Float[Tensor, " n"]:
    """How much each of the n entries along the axis is kept: its mean weight over all data, scaled to 0..1.

    Zeros where all mean weights are equal.
    """
    mean = weights.movedim(axis, -1).flatten(0, -2).mean(0)
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low) if high > low else torch.zeros_like(mean)
