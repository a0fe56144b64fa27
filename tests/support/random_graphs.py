"""Random graphs, for networkx and as edges."""

from __future__ import annotations

import networkx
import torch
from torch import Tensor


def random_graph(nodes: int, chance: float, seed: int) -> tuple[networkx.Graph, Tensor]:
    """Return a graph, and its edges `(2, E)`, each in one direction or the other."""
    graph = networkx.gnp_random_graph(nodes, chance, seed=seed)
    edges = torch.tensor(list(graph.edges), dtype=torch.int64).reshape(-1, 2).T
    turned = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(seed)) < 0.5
    return graph, torch.where(turned, edges.flip(0), edges)
