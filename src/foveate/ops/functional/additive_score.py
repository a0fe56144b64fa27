"""The additive score of pairs: what Bahdanau's attention, pointers and their kin share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def pairs(left: Float[Tensor, "... q a"], right: Float[Tensor, "... k a"]) -> Float[Tensor, "... q k a"]:
    """The sum of every query's part and every key's part."""
    return left[..., :, None, :] + right[..., None, :, :]


def read_out(hidden: Float[Tensor, "... q k a"], v: Float[Tensor, "... a"]) -> Float[Tensor, "... q k"]:
    """`v . hidden`; the leading dimensions of v (one for each head, or none) are the last leading ones of `hidden`."""
    return (hidden @ v[..., None, :, None]).squeeze(-1)


def pair_score(
    left: Float[Tensor, "... q a"], right: Float[Tensor, "... k a"], v: Float[Tensor, "... a"],
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Float[Tensor, "... q k"]:  # fmt: skip
    """The additive score `v . activation(left_i + right_j)` of projected queries and projected keys.

    Holds `q x k x a` numbers. Any bias belongs to one of the projections.
    """
    return read_out(activation(pairs(left, right)), v)
