"""Decayed scans over a short chunk, as products with lower-triangular matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.ops import causal


def decay_matrix(factors: Float[Tensor, "... c"]) -> Float[Tensor, "... c c"]:
    """How much of what comes in at s is left at t: the product of `factors` over s+1..t, and 0 above the diagonal.

    A running product, not a quotient or an exponential of logs: factors of exactly 0 are fine.
    """
    n = factors.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=factors.device).tril(-1)
    return torch.where(later, factors[..., :, None], 1.0).cumprod(-2).tril()


def linear_recurrence(
    factors: Float[Tensor, "... c"], x: Float[Tensor, "... c e"], initial: Float[Tensor, "... e"] | None = None
) -> Float[Tensor, "... c e"]:
    """All of `y_t = factors_t y_{t-1} + x_t`, from `y_{-1} = initial` (zeros where None). O(c² e)."""
    out = causal.product(decay_matrix(factors), x)
    if initial is None:
        return out
    return out + factors.cumprod(-1)[..., None] * initial[..., None, :]
