"""The heads with the largest scores."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from foveate.core import validate


def top_heads(scores: Float[Tensor, "l h"], count: int | None = None, at_least: float = 0.1) -> list[tuple[int, int]]:
    """Return the heads with the largest scores as pairs of layer and head, the largest first.

    Args:
        count: the number of heads; None for all whose score is `at_least`.
        at_least: the least score; 0.1 is the bound of a retrieval head.
    """
    if count is not None:
        validate.count("count", count, 1)
    order = scores.flatten().argsort(descending=True, stable=True)
    chosen = order[scores.flatten()[order] >= at_least] if count is None else order[:count]
    return [(int(place) // scores.shape[1], int(place) % scores.shape[1]) for place in chosen]
