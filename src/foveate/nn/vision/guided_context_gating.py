"""Guided context gating: a map with its own global context decides which positions of the map pass.

Guided Context Gating: Learning to leverage salient lesions in retinal fundus images (2024), arXiv 2406.13126.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.parts.gating import ChannelPerceptron, narrowed
from foveate.nn.parts.spatial import like_map, tokens

#: The epsilon of Keras's LayerNorm, which the release uses.
EPS = 1e-3


@final
class GuidedContextGating(FeatureGate):
    """`psi x`, with one weight psi between 0 and 1 for each position.

        context     c = sum_p a_p x_p,  a = softmax_p(w x_p)
        guide       g = x + W_2 relu(W_1 c)
        gate        psi = sigmoid(v LayerNorm(relu(relu(W_x x + b_x) + relu(W_g g + b_g) + b)) + b_psi)

    It is a global context block, whose output guides an additive gate on its input. psi is meant as a map of what is
    salient, such as lesions; nothing makes it large there, since values also pass through the context. Cost `O(N C²)`;
    positions have no order. The wrong choice if positions have to be mixed, or for a light
    gate: it has `2 C² + 2 C² / reduction` weights.

    Args:
        channels: C.
        reduction: C over the width between W_1 and W_2, which is at least 1.
        hidden: the width itself, in the place of `reduction`.
        variant: "paper" as above. In the "release" the softmax runs over an axis of size 1, so that all a_p are 1: c is
            the sum over positions, and w has no effect.
        dims: number of spatial axes; None for 1, 2 or 3.
    """

    def __init__(
        self, channels: int, reduction: int = 8, *, hidden: int | None = None,
        variant: Literal["paper", "release"] = "paper", dims: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, dims)
        validate.one_of("variant", variant, ("paper", "release"))
        self.variant = variant
        self.attend = nn.Linear(channels, 1, bias=False)
        self.transform = ChannelPerceptron(channels, narrowed(channels, reduction, hidden), bias=False)
        self.of_x, self.of_guide = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm, self.psi = nn.LayerNorm(channels, eps=EPS), nn.Linear(channels, 1)
        for linear in (self.attend, self.transform.narrow, self.transform.widen):
            nn.init.kaiming_normal_(linear.weight)
        for linear in (self.of_x, self.of_guide, self.psi):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b 1 *space"]:
        """Return psi."""
        self._check(x)
        return self._weights(x)

    def context_weights(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b 1 *space"]:
        """Return a, the share of each position in the context."""
        self._check(x)
        return like_map(self._shares(tokens(x)), x)

    def _shares(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n 1"]:
        return torch.softmax(self.attend(x), 1 if self.variant == "paper" else 2)

    def _weights(self, x: Tensor) -> Tensor:
        flat = tokens(x)
        context = (self._shares(flat) * flat).sum(1)
        guide = flat + self.transform(context)[:, None]
        met = F.relu(F.relu(self.of_x(flat)) + F.relu(self.of_guide(guide)) + self.bias)
        return like_map(torch.sigmoid(self.psi(self.norm(met))), x)

    def _gate(self, x: Tensor) -> Tensor:
        return x * self._weights(x)

    @classmethod
    def example(cls, channels: int, dims: int) -> Self:
        return cls(channels, reduction=2)
