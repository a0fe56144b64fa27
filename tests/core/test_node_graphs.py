"""Edges to adjacency and hops, against networkx."""

from __future__ import annotations

import networkx
import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.core.node_graphs import UNREACHED, adjacency, check_edges, hop_distances, token_hops
from tests.support.random_graphs import random_graph


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nodes", [1, 7, 30])
def test_adjacency_and_hops_are_networkx(nodes: int, seed: int) -> None:
    graph, edges = random_graph(nodes, 2 / nodes, seed)
    linked = adjacency(edges, nodes)
    assert torch.equal(linked, torch.tensor(networkx.to_numpy_array(graph)) > 0)
    expected = torch.full((nodes, nodes), UNREACHED)
    for start, found in networkx.all_pairs_shortest_path_length(graph):
        for end, hops in found.items():
            expected[start, end] = hops
    assert torch.equal(hop_distances(linked), expected)


def test_loops_and_repeated_edges_change_nothing() -> None:
    edges = torch.tensor([[0, 1, 1, 2, 1], [1, 0, 1, 2, 2]])
    assert adjacency(edges, 3).int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert adjacency(edges[:, :0], 0).shape == (0, 0)


def test_hops_of_a_directed_graph_follow_its_links() -> None:
    chain = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert hop_distances(chain).tolist() == [[0, 1, 2], [-1, 0, 1], [-1, -1, 0]]


def test_hops_between_tokens_run_through_nodes_of_the_text() -> None:
    edges = torch.tensor([[900, 5, 5, 7], [5, 7, 1, 900]])
    nodes = torch.tensor([900, -1, 1, 7, -1, 900])
    assert token_hops(nodes, edges).tolist() == [[0, -1, 1, 0], [-1, 0, -1, -1], [1, -1, 0, 1], [0, -1, 1, 0]]
    nodes[1] = 5
    assert token_hops(nodes, edges).tolist() == [
        [0, 1, 2, 1, 0], [1, 0, 1, 1, 1], [2, 1, 0, 2, 2], [1, 1, 2, 0, 1], [0, 1, 2, 1, 0],
    ]  # fmt: skip
    assert token_hops(torch.full((4,), -1), edges).shape == (0, 0)


@pytest.mark.parametrize("edges", [torch.zeros(3, 2).long(), torch.zeros(2, 3), torch.zeros(2).long(), [[0], [1]]])
def test_what_is_no_edges_is_refused(edges: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"edges must be pairs of nodes \(2, E\) of int64; got"):
        check_edges(edges)


def test_nodes_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match=r"edges must name nodes that are in 0..1; got 0..2"):
        adjacency(torch.tensor([[0, 1], [1, 2]]), 2)
    with pytest.raises(OptionError, match=r"edges must name nodes that are 0 or more; got -1..2"):
        check_edges(torch.tensor([[-1], [2]]))
    with pytest.raises(ShapeError, match=r"nodes must be the node of each token, \(T,\) of int64"):
        token_hops(torch.zeros(4), torch.tensor([[0], [1]]))
