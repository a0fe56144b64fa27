"""Products in which the future takes no part, whatever it holds.

A weight of 0 on what comes later is not enough: 0 times NaN is NaN. Where there is NaN or inf, it is taken out, and put
back from its own token on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.readable import is_clean


def product(weights: Float[Tensor, "... q k"], values: Float[Tensor, "... k e"]) -> Float[Tensor, "... q e"]:
    """`weights @ values`, for weights that are 0 above the diagonal; the last row is that of the last value."""
    if is_clean(values):
        return weights @ values
    bad = ~torch.isfinite(values)
    past = values.shape[-2] - weights.shape[-2]
    return weights @ values.masked_fill(bad, 0.0) + poison(bad)[..., past:, :].to(weights.dtype)


def poison(bad: Tensor) -> Float[Tensor, "... k e"]:
    """NaN in each column from its first bad token on, 0 before it."""
    since = bad.to(torch.int8).cummax(-2).values.bool()
    return torch.zeros(since.shape, device=bad.device).masked_fill(since, float("nan"))
