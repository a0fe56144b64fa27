"""Decayed scans over a short chunk, as products with lower-triangular matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from foveate.ops.functional.causal import causal_product


def decay_matrix(factors: Inexact[Tensor, "... c"]) -> Inexact[Tensor, "... c c"]:
    """Return the share of the input at s that is left at t: the product of `factors` over s+1..t, 0 above the diagonal.

    It is a running product, not a quotient or an exponential of logs, so factors of exactly 0 are fine.
    """
    n = factors.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=factors.device).tril(-1)
    return without_traces(torch.where(later, factors[..., :, None], 1.0).cumprod(-2).tril())


def since_the_start(factors: Inexact[Tensor, "... c"]) -> Inexact[Tensor, "... c"]:
    """Return the share of the initial state that is left at t."""
    return without_traces(factors.cumprod(-1))


def without_traces(left: Tensor) -> Tensor:
    """Set tiny shares to zero, since they only cost time.

    Numbers below the smallest normal one are many times as slow to multiply, and with a momentum of 0.1 a share reaches
    them within 40 tokens. The bound leaves room for small factors. Gradients do not change.
    """
    number, given = torch.finfo(left.dtype), left.detach()
    return left - torch.where(given.abs() < number.tiny / number.eps, given, 0.0)


def linear_recurrence(
    factors: Float[Tensor, "... c"], x: Float[Tensor, "... c e"], initial: Float[Tensor, "... e"] | None = None
) -> Float[Tensor, "... c e"]:
    """Return all `y_t = factors_t y_{t-1} + x_t`, from `y_{-1} = initial` (None for zeros), in O(c² e)."""
    out = causal_product(decay_matrix(factors), x)
    if initial is None:
        return out
    return out + since_the_start(factors)[..., None] * initial[..., None, :]
