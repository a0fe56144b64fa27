"""Scores by distance: from one row of numbers per query, indexed by how far back a key lies, to places in a tile."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.scoring import Tile


def skew(x: Float[Tensor, "... n w"]) -> Float[Tensor, "... n w"]:
    """From distances to places: entry `(i, j)` of the result is `x[i, n - 1 - i + j]`.

    Where column c of `x (..., n, w)` belongs to the distance `n0 - c`, the one of the last query from the first key
    being `n0`, column j of the result belongs to key j. Entries for which `x` has no column, those above the diagonal
    where `w = n`, hold anything. A pad and a reshape: no index, and `n (w + 1)` numbers of memory.
    """
    n, w = x.shape[-2:]
    return F.pad(x, (1, 0)).flatten(-2)[..., n:].unflatten(-1, (n, w))


def distances(at: Tile) -> Int[Tensor, " w"]:
    """The distances that a tile's queries have from its keys: `skew`'s columns, the largest first, the future left out.

    The tile's last key may not lie in the future of its last query.
    """
    row, col = (int(at.rows[0]), int(at.cols[0])) if at.first is None else at.first
    furthest, nearest = row + len(at.rows) - 1 - col, row - (col + len(at.cols) - 1)
    return torch.arange(furthest, max(nearest, 0) - 1, -1, device=at.rows.device)


def skewed(q: Float[Tensor, "b h n d"], embeddings: Float[Tensor, "h w d"], n_keys: int) -> Float[Tensor, "b h n k"]:
    """`q_i . e` of a tile, for the embeddings of its `distances`."""
    return skew(q @ embeddings.transpose(-1, -2))[..., :n_keys]


def gathered(q: Float[Tensor, "b h n d"], embeddings: Float[Tensor, "h n k d"]) -> Float[Tensor, "b h n k"]:
    """The same from an embedding for each pair, O(n k d) memory: the plain twin of `skewed`."""
    return torch.einsum("bhnd,hnkd->bhnk", q, embeddings)
