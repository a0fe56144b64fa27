"""Projections of points to two or three dimensions: principal components, t-SNE and UMAP."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError

Method = Literal["pca", "tsne", "umap"]
Metric = Literal["cosine", "euclidean"]


def projected(points: Float[Tensor, "n d"], method: Method, dim: int, metric: Metric) -> Float[Tensor, "n dim"]:
    """Project points. Equal points give equal results: no step is random.

    Args:
        points: at least four.
        method: "pca" needs no package, "tsne" scikit-learn, "umap" umap-learn.
        dim: 2 or 3.
        metric: the distance that t-SNE and UMAP keep; principal components have none.
    """
    validate.one_of("method", method, ("pca", "tsne", "umap"))
    validate.one_of("dim", dim, (2, 3))
    validate.one_of("metric", metric, ("cosine", "euclidean"))
    if len(points) < 4:
        raise OptionError(f"a projection needs at least 4 queries and keys together; got {len(points)}")
    if method == "pca":
        return principal_components(points, dim)
    return (_tsne if method == "tsne" else _umap)(points, dim, metric)


def principal_components(points: Float[Tensor, "n d"], dim: int) -> Float[Tensor, "n dim"]:
    """Return the first principal components; the largest entry of each direction is positive."""
    centred = (points - points.mean(0)).double()
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors
    directions = vectors[:, -dim:].flip(1)
    if directions.shape[1] < dim:
        directions = F.pad(directions, (0, dim - directions.shape[1]))
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (centred @ (directions * torch.where(largest < 0, -1.0, 1.0))).to(points.dtype)


def _start(points: Tensor, dim: int, spread: float) -> Tensor:
    """Return where the points start: their principal components, small."""
    first = principal_components(points, dim).double()
    return first / first[:, 0].std().clamp_min(1e-12) * spread


def _tsne(points: Tensor, dim: int, metric: Metric) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise OptionError('method="tsne" needs the package scikit-learn: pip install "foveate[views]"') from None
    numbers = points.double().cpu().numpy()
    perplexity = min(30.0, (len(points) - 1) / 3)
    start = _start(points, dim, 1e-4).cpu().numpy()
    model = TSNE(dim, perplexity=perplexity, metric=metric, init=start, random_state=0)
    return torch.from_numpy(model.fit_transform(numbers)).to(points)


def _umap(points: Tensor, dim: int, metric: Metric) -> Tensor:
    try:
        from umap import UMAP
    except ImportError:
        raise OptionError('method="umap" needs the package umap-learn: pip install "foveate[views]"') from None
    start = _start(points, dim, 10.0).float().cpu().numpy()
    near = min(15, len(points) - 1)
    model = UMAP(n_neighbors=near, n_components=dim, metric=metric, init=start, random_state=0, n_jobs=1)
    return torch.from_numpy(model.fit_transform(points.float().cpu().numpy())).to(points)
