"""Graph attention: a node attends to the nodes that an edge joins to it.

Graph Attention Networks (2017), arXiv 1710.10903.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.core.node_graphs import check_edges


@final
class GraphAttention(nn.Module):
    """`out_i = sum_j a_ij W x_j` for each head, over the nodes j with an edge to i, and i itself.

    The weights a_ij are the softmax over j of `leaky_relu(a_src . W x_j + a_dst . W x_i)`. Time and memory grow with
    nodes and edges; there is no N x N matrix. The wrong choice if nodes have to prefer different neighbours: all nodes
    order the same neighbours alike, since the two terms do not interact.

    Args:
        dim: C, the width of nodes.
        out_dim: the width of a head's output.
        heads: H.
        concat: True gives heads' outputs side by side, `H out_dim` wide, False their mean.
        slope: the slope of the leaky ReLU below 0.
        dropout: the share of weights that training drops.
        bias: True adds a learned bias to the output.

    Parameters are named, shaped and first drawn as those of PyTorch Geometric's `GATConv` (`lin` in its later
    releases, where one matrix serves both ends). As there, given loops are replaced by one for each node.
    """

    def __init__(
        self, dim: int, out_dim: int, heads: int = 1, *, concat: bool = False, slope: float = 0.2, dropout: float = 0.0,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("dim", dim), ("out_dim", out_dim), ("heads", heads)):
            validate.count(name, value, 1)
        validate.flag("concat", concat)
        validate.between("dropout", dropout, 0.0, 1.0)
        self.dim, self.out_dim, self.heads, self.concat = dim, out_dim, heads, concat
        self.slope, self.dropout = slope, dropout
        self.lin_src = nn.Linear(dim, heads * out_dim, bias=False)
        nn.init.xavier_uniform_(self.lin_src.weight)
        self.att_src = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, out_dim))[None])
        self.att_dst = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, out_dim))[None])
        self.bias = nn.Parameter(torch.zeros(heads * out_dim if concat else out_dim)) if bias else None

    def forward(self, x: Float[Tensor, "n c"], edges: Int[Tensor, "2 e"]) -> Float[Tensor, "n out"]:
        """Let nodes attend along edges.

        Args:
            x: nodes.
            edges: from a node (first row) to the node that attends to it; an edge that is given twice counts twice.
        """
        (source, target), weights, values = self._attend(x, edges)
        weights = F.dropout(weights, self.dropout, self.training)
        heads = torch.zeros_like(values).index_add(0, target, weights[..., None] * values[source])
        out = heads.flatten(1) if self.concat else heads.mean(1)
        return out if self.bias is None else out + self.bias

    def weights(
        self, x: Float[Tensor, "n c"], edges: Int[Tensor, "2 e"]
    ) -> tuple[Int[Tensor, "2 f"], Float[Tensor, "f h"]]:
        """Return the edges with a loop for each node behind them, and the weight of each; a target's add up to 1."""
        edges, weights, _ = self._attend(x, edges)
        return edges, weights

    def _attend(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Float[Tensor, "n h out"]]:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"x must be nodes (N, C={self.dim}); got {shown(x)}")
        check_edges(edges, len(x))
        loops = torch.arange(len(x), device=edges.device).expand(2, -1)
        edges = torch.cat([edges[:, edges[0] != edges[1]], loops], 1)
        values = self.lin_src(x).unflatten(1, (self.heads, self.out_dim))
        sent, asked = (values * self.att_src).sum(-1), (values * self.att_dst).sum(-1)
        logits = F.leaky_relu(sent[edges[0]] + asked[edges[1]], self.slope)
        return edges, _softmax(logits, edges[1], len(x)), values


def _softmax(logits: Float[Tensor, "f h"], target: Int[Tensor, " f"], nodes: int) -> Float[Tensor, "f h"]:
    """Return the softmax over the edges of each target; each node is the target of one edge at least."""
    index = target[:, None].expand_as(logits)
    largest = logits.new_full((nodes, logits.shape[1]), -torch.inf).scatter_reduce(0, index, logits.detach(), "amax")
    shares = (logits - largest[target]).exp()
    return shares / torch.zeros_like(largest).index_add(0, target, shares)[target]
