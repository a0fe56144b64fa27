"""Graphs of numbered nodes: edges as pairs of numbers, the adjacency matrix, and distances in hops."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown

#: The number of hops between nodes that no path joins.
UNREACHED = -1


def check_edges(edges: Tensor, nodes: int | None = None) -> None:
    """Refuse what is no edges `(2, E)` between nodes from 0 on, or names a node that is not among the first `nodes`."""
    if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
        raise ShapeError(f"edges must be pairs of nodes (2, E) of int64; got {shown(edges)}")
    if edges.numel() == 0:
        return
    least, most = int(edges.min()), int(edges.max())
    if least < 0 or (nodes is not None and most >= nodes):
        valid = "0 or more" if nodes is None else f"in 0..{nodes - 1}"
        raise OptionError(f"edges must name nodes that are {valid}; got {least}..{most}")


def adjacency(edges: Int[Tensor, "2 e"], nodes: int) -> Bool[Tensor, "n n"]:
    """Return the pairs of nodes with an edge in either direction. No node is linked to itself."""
    check_edges(edges, nodes)
    linked = torch.zeros(nodes, nodes, dtype=torch.bool, device=edges.device)
    linked[edges[0], edges[1]] = True
    return (linked | linked.mT) & ~torch.eye(nodes, dtype=torch.bool, device=edges.device)


def hop_distances(linked: Bool[Tensor, "n n"]) -> Int[Tensor, "n n"]:
    """Return the number of links on the shortest path between two nodes; `UNREACHED` without a path.

    Costs a product of matrices for each hop of the longest shortest path.
    """
    reached = torch.eye(len(linked), dtype=torch.bool, device=linked.device)
    step = (linked | reached).float()
    hops = torch.where(reached, 0, UNREACHED)
    for hop in range(1, len(linked)):
        further = reached.float() @ step > 0
        if torch.equal(further, reached):
            break
        hops = torch.where(further & ~reached, hop, hops)
        reached = further
    return hops


def token_hops(nodes: Int[Tensor, " t"], edges: Int[Tensor, "2 e"]) -> Int[Tensor, "m m"]:
    """Return the hops between the M tokens of a text that stand for nodes, in their order.

    Paths run through nodes of the text alone: an edge to another node does not count.

    Args:
        nodes: the node of each token; -1 for tokens that stand for none.
        edges: pairs of nodes, in either direction.
    """
    if not isinstance(nodes, Tensor) or nodes.dim() != 1 or nodes.dtype != torch.int64:
        raise ShapeError(f"nodes must be the node of each token, (T,) of int64; got {shown(nodes)}")
    check_edges(edges)
    names, number = torch.unique(nodes[nodes >= 0], return_inverse=True)
    inside = edges[:, torch.isin(edges, names).all(0)]
    hops = hop_distances(adjacency(torch.searchsorted(names, inside), len(names)))
    return hops[number[:, None], number]
