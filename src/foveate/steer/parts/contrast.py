"""Parts of contrastive decoding: the difference of two readings' logits, and the tokens that remain plausible."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate


def contrast(logits: Float[Tensor, "*b v"], branch: Float[Tensor, "*b v"], alpha: float) -> Float[Tensor, "*b v"]:
    """Return `(1 + alpha) * logits - alpha * branch`: what the first reading says more than the second, amplified.

    A sequence whose second reading has a NaN keeps its logits, and so does a token whose difference is not finite.

    Args:
        logits: of the reading as it is.
        branch: of the second reading.
        alpha: the strength, 0 for no contrast.
    """
    more = logits - branch
    broken = branch.isnan().any(-1, keepdim=True) | ~more.isfinite()
    return torch.where(broken, logits, logits + alpha * more)


def plausible(logits: Float[Tensor, "*b v"], beta: float) -> Bool[Tensor, "*b v"]:
    """Return the tokens with at least `beta` times the probability of the likeliest one; all of them for 0."""
    validate.between("beta", beta, 0.0, 1.0)
    if beta == 0:
        return torch.ones_like(logits, dtype=torch.bool)
    return logits >= logits.amax(-1, keepdim=True) + math.log(beta)
