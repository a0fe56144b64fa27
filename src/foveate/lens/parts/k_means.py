"""K-means on the rows of a matrix, with k-means++ starts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import OptionError


def k_means(
    points: Float[Tensor, "n d"], clusters: int, *, generator: torch.Generator, starts: int = 4, steps: int = 100
) -> tuple[Int[Tensor, " n"], Float[Tensor, "c d"]]:
    """Return each point's cluster and the clusters' centres: the best of some starts, by the sum of squared distances.

    Args:
        points: at least as many as clusters.
        clusters: number of clusters.
        generator: draws the starts.
        starts: number of starts.
        steps: most steps of a start; it ends when no point changes its cluster.
    """
    if not 1 <= clusters <= len(points):
        raise OptionError(f"clusters={clusters} must be in 1..{len(points)}, the number of points")
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(starts):
        centres = _spread(points, clusters, generator)
        labels = torch.cdist(points, centres).argmin(1)
        for _ in range(steps):
            centres = _means(points, labels, centres)
            before, labels = labels, torch.cdist(points, centres).argmin(1)
            if torch.equal(before, labels):
                break
        error = float((points - centres[labels]).square().sum())
        if best is None or error < best[0]:
            best = error, labels, centres
    assert best is not None  # there is a start
    return best[1], best[2]


def _spread(points: Float[Tensor, "n d"], clusters: int, generator: torch.Generator) -> Float[Tensor, "c d"]:
    """Draw centres from the points, each with a probability that grows with its squared distance to those before."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    for _ in range(clusters - 1):
        far = torch.cdist(points, points[chosen]).amin(1).square().cpu()
        weights = far if bool(far.sum() > 0) else torch.ones_like(far)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _means(points: Float[Tensor, "n d"], labels: Int[Tensor, " n"], centres: Float[Tensor, "c d"]) -> Tensor:
    """Return the mean of each cluster's points; a cluster without points keeps its centre."""
    sums = torch.zeros_like(centres).index_add_(0, labels, points)
    counts = labels.bincount(minlength=len(centres))[:, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), centres)
