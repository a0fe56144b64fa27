"""Causal products in which NaN or inf in the future has no effect.

A weight of 0 on later tokens is not enough, since 0 times NaN is NaN. So NaN and inf are removed, and put back from
their own token on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.readable import is_clean


def causal_product(weights: Float[Tensor, "... q k"], values: Float[Tensor, "... k e"]) -> Float[Tensor, "... q e"]:
    """Return `weights @ values`, for weights that are 0 above the diagonal; the last row belongs to the last value."""
    if is_clean(values):
        return weights @ values
    bad = ~torch.isfinite(values)
    past = values.shape[-2] - weights.shape[-2]
    return weights @ values.masked_fill(bad, 0.0) + poison(bad)[..., past:, :].to(weights.dtype)


def poison(bad: Tensor) -> Float[Tensor, "... k e"]:
    """Return NaN in each column from its first bad token on, and 0 before it."""
    since = bad.to(torch.int8).cummax(-2).values.bool()
    return torch.zeros(since.shape, device=bad.device).masked_fill(since, float("nan"))
