"""Distances between heads, and a plane that shows them.

What Does BERT Look At? An Analysis of BERT's Attention (2019), arXiv 1906.04341.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError


def js_distance(
    attention: Iterable[Float[Tensor, "l h t t"]], smoothing: float = 0.001
) -> Float[Tensor, "heads heads"]:
    """Return the Jensen-Shannon divergence between all heads, in nats, summed over the tokens of all texts.

    It is 0 for equal maps only, and at most log 2 for a token. There is no square root: SciPy's `jensenshannon` has to
    be squared.

    Args:
        attention: a map for each text; heads are numbered layer after layer, `layer * H + head`.
        smoothing: the share of a uniform distribution that is mixed into each row.
    """
    validate.between("smoothing", smoothing, 0.0, 1.0)
    total: Tensor | None = None
    for maps in attention:
        if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2]:
            raise ShapeError(f"attention must hold maps (L, H, T, T); got {tuple(maps.shape)}")
        rows = maps.flatten(0, 1).double()
        rows = (1 - smoothing) * rows + smoothing / rows.shape[-1]
        found = _divergences(rows)
        total = found if total is None else total + found
    if total is None:
        raise OptionError("attention must hold at least one map; got none")
    return total


def _divergences(rows: Float[Tensor, "heads t t"]) -> Float[Tensor, "heads heads"]:
    """Return the entropy of the mean of two rows less the mean of their entropies, summed over rows."""
    own, found = torch.special.entr(rows), rows.new_zeros(len(rows), len(rows))
    for head in range(len(rows)):
        mean = (rows[head] + rows[head:]) / 2
        found[head, head:] = (torch.special.entr(mean) - (own[head] + own[head:]) / 2).sum((-2, -1))
    return (found + found.triu(0).mT).clamp_min(0.0)


def embed_heads(distance: Float[Tensor, "heads heads"], dims: int = 2, steps: int = 300) -> Float[Tensor, "heads dims"]:
    """Place heads in a plane so that their Euclidean distances come near the given ones: metric scaling.

    It starts from classical scaling and lowers the stress by majorisation (SMACOF), so that it needs no random start.

    Args:
        distance: a symmetric matrix with a zero diagonal, such as `js_distance` gives.
        dims: the dimensions of the plane.
        steps: the number of majorisation steps.
    """
    validate.count("dims", dims, 1)
    validate.count("steps", steps)
    n = distance.shape[0]
    if distance.ndim != 2 or distance.shape[1] != n or not torch.allclose(distance, distance.mT):
        raise ShapeError(f"distance must be a symmetric matrix (heads, heads); got {tuple(distance.shape)}")
    goal = distance.double()
    centre = torch.eye(n, dtype=goal.dtype, device=goal.device) - 1 / n
    values, vectors = torch.linalg.eigh(-0.5 * centre @ goal.square() @ centre)
    places = vectors[:, -dims:] * values[-dims:].clamp_min(0.0).sqrt()
    for _ in range(steps):
        now = torch.cdist(places, places)
        pull = torch.where(now > 0, -goal / now.clamp_min(1e-12), 0.0).fill_diagonal_(0.0)
        pull = pull - torch.diag(pull.sum(1))
        places = pull @ places / n
    return places.flip(1)
