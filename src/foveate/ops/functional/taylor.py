"""Features whose dot product is a truncated exponential: `f(x) . f(y) = sum_p (x . y)^p / p!`."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor


def taylor_features(x: Float[Tensor, "... d"], order: int, *, symmetric: bool = False) -> Float[Tensor, "... f"]:
    """Return all products of up to `order` entries of x, each of degree p divided by `sqrt(p!)`.

    `symmetric` merges products that differ only in the order of their factors into one with the weight of all. It gives
    the same dot products from `comb(d + order, order)` features in place of `sum_p d^p`.
    """
    ones = torch.ones_like(x[..., :1])
    if symmetric:
        parts = [x[..., at].prod(-1) * weight for at, weight in (_monomials(x, p) for p in range(1, order + 1))]
        return torch.cat([ones, *parts], -1)
    parts = [ones]
    for p in range(1, order + 1):
        parts.append((parts[-1][..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(p))
    return torch.cat(parts, -1)


def taylor_size(width: int, order: int, *, symmetric: bool = False) -> int:
    """Return the number of features."""
    return math.comb(width + order, order) if symmetric else sum(width**p for p in range(order + 1))


def _monomials(x: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Return the entries in each product of this degree, `(f, degree)`, and its weight `(f,)`."""
    places, weights = _table(x.shape[-1], degree)
    return torch.tensor(places, device=x.device), torch.tensor(weights, device=x.device, dtype=x.dtype)


@cache
def _table(width: int, degree: int) -> tuple[list[tuple[int, ...]], list[float]]:
    places = list(combinations_with_replacement(range(width), degree))
    # p! / prod(m!) orders of the factors, times 1 / p!
    return places, [math.prod(math.factorial(m) for m in Counter(at).values()) ** -0.5 for at in places]
