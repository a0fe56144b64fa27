"""The non-local block: each position receives a weighted sum over all positions of the map.

Non-local Neural Networks (2017), arXiv 1711.07971.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import finite, narrowed
from foveate.nn.parts.spatial import coarse, like_map, tokens

Kind = Literal["embedded", "gaussian", "dot", "concatenation"]


@final
class NonLocal(FeatureGate):
    """`x_i + BN(W_z y_i)` with `y_i = sum_j f(x_i, x_j) g(x_j) / C(x)` over all positions j.

        embedded        f = exp(theta(x_i) phi(x_j)), C the sum over j: softmax attention with one head
        gaussian        the same of x itself: f = exp(x_i x_j)
        dot             f = theta(x_i) phi(x_j), C the number of positions
        concatenation   f = relu(w [theta(x_i), phi(x_j)]), C the number of positions

    BN starts at 0, so that the block begins as the identity and can go into a trained network. Cost O(N² C). The wrong
    choice for maps of many positions, or where position matters: a permutation of the map permutes the output.

    Args:
        channels: C.
        reduction: C over the width of theta, phi and g.
        hidden: the width itself, in the place of `reduction`.
        kind: f, see above.
        scale: factor on products of theta and phi, or of x, in the exponential or in the dot product. The paper has
            none, its release `hidden ** -0.5`, timm `channels ** -0.5`.
        subsample: True pools phi and g by maxima over windows of 2 along each axis, for a quarter of the pairs on
            images. On maps with three axes the first one is time, which is not pooled.
        norm: False leaves BN out; W_z then starts at 0.
        dims: number of spatial axes; None for 1, 2 or 3.
    """

    def __init__(
        self, channels: int, reduction: int = 2, *, hidden: int | None = None, kind: Kind = "embedded",
        scale: float = 1.0, subsample: bool = False, norm: bool = True, dims: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        width = narrowed(channels, reduction, hidden)
        validate.one_of("kind", kind, ("embedded", "gaussian", "dot", "concatenation"))
        self.kind, self.scale, self.subsample = kind, finite("scale", scale), subsample
        embeds = kind != "gaussian"
        self.theta = nn.Linear(channels, width) if embeds else nn.Identity()
        self.phi = nn.Linear(channels, width) if embeds else nn.Identity()
        self.pair = nn.Linear(2 * width, 1, bias=False) if kind == "concatenation" else None
        self.g, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.norm = nn.BatchNorm1d(channels) if norm else nn.Identity()
        for parameter in (self.norm if norm else self.out).parameters():
            nn.init.zeros_(parameter)

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b n m"]:
        """Return `f / C` of each position with each of the M positions that phi and g have."""
        self._check(x)
        theta, phi = self.theta(tokens(x)), self._read(self.phi, x)
        if self.pair is not None:
            of_theta, of_phi = self.pair.weight[0].chunk(2)
            return F.relu((theta @ of_theta)[:, :, None] + (phi @ of_phi)[:, None]) / phi.shape[1]
        products = self.scale * theta @ phi.mT
        return products / phi.shape[1] if self.kind == "dot" else torch.softmax(products, -1)

    def _read(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Apply a layer at each position; with `subsample`, keep the largest of each window."""
        out = linear(tokens(x))
        if not self.subsample:
            return out
        time = [1] if x.dim() == 5 else []
        return tokens(coarse(like_map(out, x), time + [2] * (x.dim() - 2 - len(time))))

    def _gate(self, x: Tensor) -> Tensor:
        g = self._read(self.g, x)
        if self.kind in ("embedded", "gaussian"):  # without a matrix N x N in memory, where the device can
            y = F.scaled_dot_product_attention(
                self.theta(tokens(x))[:, None], self._read(self.phi, x)[:, None], g[:, None], scale=self.scale
            )[:, 0]
        else:
            y = self.weights(x) @ g
        return x + self.norm(self.out(y).mT).unflatten(2, x.shape[2:])

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, scale=0.5)
