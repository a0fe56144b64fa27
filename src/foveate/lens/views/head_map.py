"""A head's attention map in a size that a page can hold: tiles of tokens, and each query's strongest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.pages.packing import packed, packed_integers

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
    tiles: Float[Tensor, "t u"]
    keys: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]


def pooled(
    layer: int, head: int, weights: Float[Tensor, "n m"], tiles: int = TILES, strongest: int = STRONGEST
) -> HeadMap:
    """Pool a map of single tokens.

    Args:
        layer, head: the head.
        weights: its map.
        tiles: the most tiles on a side.
        strongest: the number of each query's keys that are kept one by one.
    """
    n, m = weights.shape
    span = max(1, -(-max(n, m) // tiles))
    rows, columns = -(-n // span), -(-m // span)
    room = rows * span - n
    inside = F.pad(weights.float(), (0, columns * span - m, 0, room))
    sums = inside.view(rows, span, columns, span).sum((1, 3))
    queries = torch.full((rows, 1), float(span))
    queries[-1] -= room
    best = weights.float().topk(min(strongest, m), dim=-1)
    return HeadMap(layer, head, span, sums.cpu() / queries, best.indices.cpu(), best.values.cpu())


def map_data(found: HeadMap, width: int | None = None) -> dict[str, Any]:
    """Return a map for a page, with the square roots of its weights, so that small ones stay apart.

    Args:
        found: the map.
        width: the bytes of a tile; None is 2 for single tokens, 1 for more.
    """
    rows, columns = found.tiles.shape
    wide = columns * found.span > 1 << 16
    width = width or (2 if found.span == 1 else 1)
    return {
        "layer": found.layer, "head": found.head, "span": found.span, "rows": rows, "columns": columns,
        "size": max(rows, columns), "width": width, "tiles": packed(found.tiles.clamp(0.0, 1.0).sqrt(), width),
        "count": found.keys.shape[1], "wide": wide,
        "keys": packed_integers(found.keys.to(torch.uint32 if wide else torch.uint16)),
        "weights": packed(found.weights.clamp(0.0, 1.0).sqrt(), 2),
    }  # fmt: skip
