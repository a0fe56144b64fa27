"""The record of a training in Scan and Snap (2023), arXiv 2305.16380: scores, token composition, and the snap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.studies.scan_and_snap.token_classes import TokenClasses


def attended(p: Float[Tensor, "*k l"], z: Float[Tensor, "*b l"]) -> Float[Tensor, "*b l"]:
    """Return the shares c of context tokens under attention: p times `exp(z)`, divided by the sum."""
    z = z.masked_fill(p == 0, -torch.inf)  # the largest score that counts is that of a token that occurs
    weights = p * (z - z.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@final
@dataclass(frozen=True, eq=False)
class Dynamics:
    """A training's attention scores at every step, and what follows from them.

    Args:
        data: the classes of sequences.
        eta_y, eta_z: the learning rates of decoder and attention.
        z: the scores before the first step and after each, `(T + 1, Q, L)`.
        loss: the cross entropy in each step, `(T,)`.
    """

    data: TokenClasses
    eta_y: float
    eta_z: float
    z: Float[Tensor, "t q l"]
    loss: Float[Tensor, " s"]

    def attention(self, t: int = -1) -> Float[Tensor, "q l"]:
        """Return the weights that each query token gives to one of each context token, after t steps."""
        return self.z[t].softmax(-1)

    def composition(self, t: int = -1) -> Float[Tensor, "k l"]:
        """Return the shares `c_{l|m,n}` of context tokens under attention for each class, after t steps."""
        return attended(self.data.p, self.z[t][self.data.query])

    def distinct_mass(self) -> Float[Tensor, " t"]:
        """Return the attention to each class's distinct tokens at every step, mean over classes."""
        return (self._compositions() * self.data.distinct).sum(-1).mean(-1)

    def common_mass(self) -> Float[Tensor, " t"]:
        """Return the attention to common tokens at every step, mean over classes."""
        return (self._compositions() * self.data.common).sum(-1).mean(-1)

    def entropy(self) -> Float[Tensor, " t"]:
        """Return the entropy of the composition in nats at every step, mean over classes."""
        return torch.special.entr(self._compositions()).sum(-1).mean(-1)

    def speed(self) -> Float[Tensor, " s"]:
        """Return how far the scores move in each step."""
        return self.z.diff(dim=0).flatten(1).norm(dim=1)

    def snap_time(self) -> int | None:
        """Return the step in which attention changes fastest; None if it does not change.

        Growth accelerates before it and slows down after it, to that of a logarithm: attention stays nearly as it is.
        """
        speed = self.speed()
        return int(speed.argmax()) + 1 if bool(speed.any()) else None

    def distinct_scores(self, t: int = -1) -> Float[Tensor, " n"]:
        """Return the scores of all distinct tokens after t steps, class by class."""
        return self.z[t][self.data.query][self.data.distinct]

    def common_scores(self, t: int = -1) -> Float[Tensor, "q c"]:
        """Return the scores of the common tokens for each query token, after t steps."""
        return self.z[t][:, self.data.common]

    def predicted_scores(self, t: int = -1) -> Float[Tensor, "k l"]:
        """Return the scores of distinct tokens that the law of growth implies, by class; 0 for other tokens.

        Where the decoder is much faster, `dz_l / dt` is in proportion to `c_l²`, with one factor for the distinct
        tokens of a class. Then `z_l = -1/2 ln(1 - 2 p_l² B)`, with a number B that grows with time. B is taken from the
        most frequent distinct token.
        """
        p = self.data.p * self.data.distinct
        best = p.argmax(-1, keepdim=True)
        z = self.z[t][self.data.query].gather(1, best)
        growth = -torch.expm1(-2 * z) / (2 * p.gather(1, best).square())
        return -0.5 * torch.log1p(-2 * p.square() * growth)

    def _compositions(self) -> Float[Tensor, "t k l"]:
        return attended(self.data.p, self.z[:, self.data.query])
