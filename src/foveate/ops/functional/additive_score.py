"""The additive score of pairs, which Bahdanau's attention and pointer networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def pairs(left: Float[Tensor, "... q a"], right: Float[Tensor, "... k a"]) -> Float[Tensor, "... q k a"]:
    """Return the sum of every query's part and every key's part."""
    return left[..., :, None, :] + right[..., None, :, :]


def read_out(hidden: Float[Tensor, "... q k a"], v: Float[Tensor, "... a"]) -> Float[Tensor, "... q k"]:
    """Return `v . hidden`; v is `(a,)`, or has a leading dimension of heads that matches that of `hidden`."""
    return (hidden @ v[..., None, :, None]).squeeze(-1)


def pair_score(
    left: Float[Tensor, "... q a"], right: Float[Tensor, "... k a"], v: Float[Tensor, "... a"],
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Float[Tensor, "... q k"]:  # fmt: skip
    """Return the additive score `v . activation(left_i + right_j)` of projected queries and projected keys.

    It holds `q x k x a` numbers. A bias belongs to one of the projections.
    """
    return read_out(activation(pairs(left, right)), v)
