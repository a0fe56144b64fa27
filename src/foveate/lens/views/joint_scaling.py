"""The two maps that bring a head's queries and keys together and leave its attention as it is.

A vector added to all keys adds one number to all logits of a query, which the softmax takes away. A factor on the
queries that is taken from the keys leaves every product as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown

#: The factors that are tried.
GRID = (0.2, 0.4, 0.8, 1.0, 1.25, 2.5, 5.0)

#: The fewest pairs that a weighted correlation is taken over.
_FEWEST = 8

#: The correlation that chooses a factor: over close pairs, near ones more, or over all pairs alike.
Criterion = Literal["weighted", "plain"]


def check_pair(q: Tensor, k: Tensor) -> None:
    """Refuse what is no queries `(n, d)` and keys `(m, d)` of one head."""
    fits = all(isinstance(x, Tensor) and x.ndim == 2 and len(x) and x.is_floating_point() for x in (q, k))
    if not fits or q.shape[1] != k.shape[1]:
        raise ShapeError(f"Q must be (n, d) and K (m, d) of one head; got {shown(q)} and {shown(k)}")


def key_shift(q: Float[Tensor, "n d"], k: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Return the vector that moves the keys' mean to the queries' mean."""
    return q.mean(0) - k.mean(0)


def norm_scale(q: Float[Tensor, "n d"], k: Float[Tensor, "m d"]) -> float:
    """Return the factor c that makes the median norms of `q * c` and `k / c` equal."""
    ratio = k.norm(dim=-1).median() / q.norm(dim=-1).median().clamp_min(1e-12)
    return float(ratio.sqrt().clamp_min(1e-12))


def search_scale(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], grid: Sequence[float] = GRID, criterion: Criterion = "weighted",
    quantile: float = 0.5,
) -> float:  # fmt: skip
    """Return the factor of a grid whose correlation of distance and product is nearest to -1.

    The correlation counts with its sign: a factor with which far pairs have large products is the worst, not the best.

    Args:
        q, k: a head's queries and its keys after the shift.
        grid: the factors that are tried.
        criterion: "weighted" is the study's correlation over close pairs, "plain" that over all pairs.
        quantile: the share of pairs that are close. The study's "0.5 percentile" may mean the median or 0.5 %. Among
            the nearest 0.5 % of pairs are very few keys, those with the smallest norms (4 of 600 in a test), so that
            their correlation chooses factors far off; the default is the median.
    """
    if not grid or min(grid) <= 0:
        raise OptionError(f"grid={tuple(grid)} must be factors above 0")
    found = [correlation(q * factor, k / factor, criterion, quantile) for factor in grid]
    return float(grid[min(range(len(grid)), key=found.__getitem__)])


def correlation(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], criterion: Criterion = "plain", quantile: float = 0.5
) -> float:
    """Return the correlation of a query's and a key's Euclidean distance with their product.

    "weighted" takes the pairs nearer than `d`, the `quantile` of all distances, with the weights `(d - distance)²`.
    The study also divides it by the number of such pairs, to compare heads; that chooses the same factor.
    0 where distances or products are all equal.
    """
    check_pair(q, k)
    validate.one_of("criterion", criterion, ("weighted", "plain"))
    validate.between("quantile", quantile, 0.0, 1.0)
    q, k = q.double(), k.double()
    distance = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").flatten()
    product = (q @ k.T).flatten()
    weight = torch.ones_like(distance)
    if criterion == "weighted":
        rank = min(len(distance), max(_FEWEST, round(quantile * len(distance))))
        weight = (distance.kthvalue(rank).values - distance).clamp_min(0.0).square()
    total = weight.sum()
    if float(total) == 0.0:
        return 0.0
    a, b = (x - (weight * x).sum() / total for x in (distance, product))
    spread = ((weight * a.square()).sum() * (weight * b.square()).sum()).sqrt()
    return float((weight * a * b).sum() / spread) if float(spread) > 0.0 else 0.0
