"""A head's attention map in a size that a page can hold: tiles of tokens, and each query's strongest keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

TILES = 256  # the most tiles on a side
STRONGEST = 8  # keys of each query that are kept one by one


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The attention map of one head.

    Args:
        layer, head: the head.
        span: the number of tokens on a tile's side; 1 for a map of single tokens.
        tiles: the weight that a tile's keys get together from its queries, on average: rows add up to 1.
        keys, weights: each query's strongest keys, the strongest first.
    """

    layer: int
    head: int
    span: int
    tiles: Float[Tensor, "t t"]
    keys: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]


def pooled(layer: int, head: int, weights: Float[Tensor, "n n"]) -> HeadMap:
    """Pool a map of single tokens."""
    n = weights.shape[0]
    span = -(-n // TILES)
    count = -(-n // span)
    room = count * span - n
    tiles = F.pad(weights.float(), (0, room, 0, room)).view(count, span, count, span).sum((1, 3))
    queries = torch.full((count, 1), float(span))
    queries[-1] -= room
    best = weights.float().topk(min(STRONGEST, n), dim=-1)
    return HeadMap(layer, head, span, tiles.cpu() / queries, best.indices.cpu(), best.values.cpu())
