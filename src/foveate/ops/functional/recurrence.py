"""Decayed scans over a short chunk, as products with lower-triangular matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.ops.functional import causal


def decay_matrix(factors: Float[Tensor, "... c"]) -> Float[Tensor, "... c c"]:
    """The share of the input at s that is left at t: the product of `factors` over s+1..t, and 0 above the diagonal.

    A running product, not a quotient or an exponential of logs: factors of exactly 0 are fine.
    """
    n = factors.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=factors.device).tril(-1)
    return without_traces(torch.where(later, factors[..., :, None], 1.0).cumprod(-2).tril())


def since_the_start(factors: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
    """The share of what was there before the first token that is left at t."""
    return without_traces(factors.cumprod(-1))


def without_traces(left: Tensor) -> Tensor:
    """Shares as they are, and zeros where so little is left that it would only cost time.

    What falls below the smallest normal number is many times as slow to multiply, and with a momentum of 0.1 a share
    gets there within 40 tokens. The bound leaves room for factors that are themselves small. Gradients are as before.
    """
    number, given = torch.finfo(left.dtype), left.detach()
    return left - torch.where(given.abs() < number.tiny / number.eps, given, 0.0)


def linear_recurrence(
    factors: Float[Tensor, "... c"], x: Float[Tensor, "... c e"], initial: Float[Tensor, "... e"] | None = None
) -> Float[Tensor, "... c e"]:
    """All of `y_t = factors_t y_{t-1} + x_t`, from `y_{-1} = initial` (zeros where None). O(c² e)."""
    out = causal.product(decay_matrix(factors), x)
    if initial is None:
        return out
    return out + since_the_start(factors)[..., None] * initial[..., None, :]
