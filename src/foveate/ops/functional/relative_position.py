"""Scores by distance: shift a query's row of numbers per distance to the positions of keys in a tile."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.scoring import Tile


def skew(x: Float[Tensor, "... n w"]) -> Float[Tensor, "... n w"]:
    """Reindex distances to positions: entry `(i, j)` of the result is `x[i, n - 1 - i + j]`.

    Let `n0` be the distance of the last query from the first key. If column c of `x (..., n, w)` belongs to the
    distance `n0 - c`, column j of the result belongs to key j. Entries without a column in `x`, those above the
    diagonal if `w = n`, are arbitrary. It is a pad and a reshape, without an index, and takes `n (w + 1)` numbers of
    memory.
    """
    n, w = x.shape[-2:]
    return F.pad(x, (1, 0)).flatten(-2)[..., n:].unflatten(-1, (n, w))


def distances(at: Tile) -> Int[Tensor, " w"]:
    """Return `skew`'s columns: the distances of a tile's queries from its keys, largest first, without the future.

    The tile's last key may not lie in the future of its last query.
    """
    row, col = (int(at.rows[0]), int(at.cols[0])) if at.first is None else at.first
    furthest, nearest = row + len(at.rows) - 1 - col, row - (col + len(at.cols) - 1)
    return torch.arange(furthest, max(nearest, 0) - 1, -1, device=at.rows.device)


def skewed(q: Float[Tensor, "b h n d"], embeddings: Float[Tensor, "_ w d"], n_keys: int) -> Float[Tensor, "b h n k"]:
    """Return `q_i . e` of a tile, for the embeddings of its `distances`."""
    return skew(q @ embeddings.transpose(-1, -2))[..., :n_keys]


def gathered(q: Float[Tensor, "b h n d"], embeddings: Float[Tensor, "_ n k d"]) -> Float[Tensor, "b h n k"]:
    """Return `skewed` from an embedding for each pair, in O(n k d) memory: the reference form."""
    return torch.einsum("bhnd,hnkd->bhnk", q, embeddings)
