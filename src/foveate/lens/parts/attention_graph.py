"""Graphs of attention: tokens are nodes, and an edge joins two of them if one attends to the other strongly enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import ShapeError, shown

#: The weight of a pair: the larger of both directions, or their mean.
Join = Literal["max", "mean"]


@final
@dataclass(frozen=True, eq=False)
class GraphStatistics:
    """Statistics of undirected graphs, one number for each graph.

    Args:
        components: Betti-0, the number of connected components.
        cycles: Betti-1, the number of independent cycles: edges - nodes + components.
        centralisation: Freeman's degree centralisation: 1 for a star, 0 if all nodes have the same degree.
        fiedler: the second smallest eigenvalue of the normalised Laplacian; 0 if the graph is not connected.
    """

    components: Int[Tensor, "*g"]
    cycles: Int[Tensor, "*g"]
    centralisation: Float[Tensor, "*g"]
    fiedler: Float[Tensor, "*g"]


def attention_graph(
    attention: Float[Tensor, "*g t t"], theta: float = 0.02, join: Join = "max"
) -> Bool[Tensor, "*g t t"]:
    """Return the adjacency of the graphs of some maps, without loops.

    Args:
        attention: weights of one text.
        theta: the weight of a pair above which there is an edge.
        join: makes one weight of both directions of a pair.
    """
    validate.between("theta", theta, 0.0, 1.0)
    validate.one_of("join", join, ("max", "mean"))
    _check_square("attention", attention)
    both = torch.maximum(attention, attention.mT) if join == "max" else (attention + attention.mT) / 2
    return (both > theta) & ~torch.eye(attention.shape[-1], dtype=torch.bool, device=attention.device)


def graph_statistics(graph: Bool[Tensor, "*g t t"]) -> GraphStatistics:
    """Return the statistics of graphs of at least three nodes, given by their symmetric adjacency without loops."""
    _check_square("graph", graph)
    if graph.dtype != torch.bool or not torch.equal(graph, graph.mT) or bool(graph.diagonal(0, -2, -1).any()):
        raise ShapeError(f"graph must be a symmetric bool adjacency without loops; got {shown(graph)}")
    degrees, t = graph.sum(-1), graph.shape[-1]
    components = _components(graph)
    edges = degrees.sum(-1) // 2
    spread = (degrees.amax(-1, keepdim=True) - degrees).sum(-1)
    return GraphStatistics(
        components, edges - t + components, spread.double() / ((t - 1) * (t - 2)), _fiedler(graph, degrees)
    )


def _components(graph: Bool[Tensor, "*g t t"]) -> Int[Tensor, "*g"]:
    """Count connected components: the nodes that are the first ones of those that they reach."""
    t = graph.shape[-1]
    reached = (graph | torch.eye(t, dtype=torch.bool, device=graph.device)).float()
    steps = 1
    while steps < t:  # squaring doubles the length of the paths
        reached, steps = (reached @ reached).clamp_max_(1.0), 2 * steps
    first = (reached > 0).to(torch.uint8).argmax(-1)
    return (first == torch.arange(t, device=graph.device)).sum(-1)


def _fiedler(graph: Bool[Tensor, "*g t t"], degrees: Int[Tensor, "*g t"]) -> Float[Tensor, "*g"]:
    root = degrees.double().clamp_min(1.0).rsqrt()
    laplacian = torch.diag_embed((degrees > 0).double()) - graph.double() * root[..., None] * root[..., None, :]
    return torch.linalg.eigvalsh(laplacian)[..., 1].clamp_min(0.0)


def _check_square(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.shape[-1] < 3:
        raise ShapeError(f"{name} must be (..., T, T) with T >= 3; got {shown(x)}")
