"""Records what PyTorch Geometric makes of a small graph: `torch_geometric.json`, which `test_torch_geometric.py` reads.

It is no part of the development environment, so that it has one of its own. By hand, from here:

    python3 -m venv /tmp/pyg && /tmp/pyg/bin/pip install torch==2.13.0 torch_geometric
    /tmp/pyg/bin/python tests/parity/torch_geometric_record.py

Both sides make the same graph and the same parameters, from one generator.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = Path(__file__).with_name("torch_geometric.json")
NODES, DIM, OUT, HEADS, HOPS = 9, 5, 3, 2, (0, 1, 2, 3)


def graph() -> Tensor:
    """Return both directions of the edges of a random graph, a loop, and an edge that is given once more."""
    draw = torch.Generator().manual_seed(0)
    linked = torch.rand(NODES, NODES, generator=draw).tril(-1) > 0.72
    edges = linked.nonzero().T
    return torch.cat([edges, edges.flip(0), torch.tensor([[4], [4]]), edges[:, :1]], 1)


def leaves(concat: bool) -> dict[str, Tensor]:
    """Return nodes, parameters and the direction of the gradient, in float64."""
    draw, width = torch.Generator().manual_seed(1), HEADS * OUT if concat else OUT
    shapes = {
        "x": (NODES, DIM), "lin": (HEADS * OUT, DIM), "att_src": (1, HEADS, OUT), "att_dst": (1, HEADS, OUT),
        "bias": (width,), "direction": (NODES, width),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def attention(concat: bool) -> dict[str, Any]:
    """Return output, weights on the edges with loops, and gradients of `GATConv`."""
    from torch_geometric.nn import GATConv

    given = leaves(concat)
    layer = GATConv(DIM, OUT, heads=HEADS, concat=concat).double()
    layer.load_state_dict(
        {"lin.weight": given["lin"], **{name: given[name] for name in ("att_src", "att_dst", "bias")}}
    )
    x = given["x"].requires_grad_()
    out, (edges, weights) = layer(x, graph(), return_attention_weights=True)
    (out * given["direction"]).sum().backward()
    grads = {n: getattr(layer, n).grad for n in ("att_src", "att_dst", "bias")}
    grads |= {"x": x.grad, "lin": layer.lin.weight.grad}
    return {
        "out": out.tolist(), "edges": edges.tolist(), "weights": weights.tolist(),
        "gradients": {name: grad.tolist() for name, grad in grads.items()},
    }  # fmt: skip


def neighbourhoods() -> dict[str, list[list[int]]]:
    """Return the nodes around each node, for each number of hops, by `k_hop_subgraph`."""
    from torch_geometric.utils import k_hop_subgraph

    def around(node: int, k: int) -> list[int]:
        return sorted(k_hop_subgraph(node, k, graph(), num_nodes=NODES)[0].tolist())

    return {str(k): [around(node, k) for node in range(NODES)] for k in HOPS}


if __name__ == "__main__":
    record = {
        "versions": {name: version(name) for name in ("torch_geometric", "torch")},
        "mean": attention(False), "concat": attention(True), "neighbourhoods": neighbourhoods(),
    }  # fmt: skip
    RECORD.write_text(json.dumps(record) + "\n", "utf-8")
