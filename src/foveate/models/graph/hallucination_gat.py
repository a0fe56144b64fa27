"""A graph attention network that says how true each generation is, from the generations similar to it.

Leveraging Graph Structures to Detect Hallucinations in Large Language Models (2024), arXiv 2407.04485.

    x = generation_embeddings(bert, tokenizer, texts)
    graph, split = GenerationGraph(x), split_nodes(len(x))
    gat = HallucinationGAT()
    pretrain_embedder(gat.embedder, x[split.train], levels[split.train])
    fit_levels(gat, x, graph.edge_index, levels, split.train, validation=split.validation)
    ordinal_levels(gat(x, graph.edge_index)[split.test])

`pretrain_embedder` and `fit_levels` are in `foveate.train`.
"""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.models.base.network import Network
from foveate.nn.parts.graph_attention import GraphAttention


@final
class HallucinationGAT(Network):
    """A classifier of nodes into ordered levels: an embedder, a linear map, and one layer of graph attention.

    Cost O(N C² + E H) for N generations and E edges. The wrong choice where similar texts are not alike in truth: with
    random edges it is no better than its embedder alone, with no edges it is a linear classifier of each node.

    Args:
        dim: C, the width of a generation's embedding.
        embed: the width of the embedder's output.
        hidden: the width of a node before attention.
        heads: H; their outputs are averaged.
        levels: the number of levels; there is a logit for each but the lowest (`ordinal_levels`).
        dropout: the share of attention weights that training drops: 0 by the release's default, 0.2 in its training.

    Raises:
        OptionError: an option out of range.

    Parts are named as in the release's weights; there `conv.lin_dst` is `conv.lin_src` once more.
    """

    released_names: ClassVar = ((r"^conv\.lin_dst\.weight$", ""),)
    batched: ClassVar = False

    def __init__(
        self, dim: int = 768, embed: int = 128, hidden: int = 32, heads: int = 2, levels: int = 4, *,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("dim", dim), ("embed", embed), ("hidden", hidden), ("heads", heads)):
            validate.count(name, value, 1)
        validate.count("levels", levels, 2)
        self.dim = dim
        self.embedder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, embed))
        self.linear = nn.Linear(embed, hidden)
        self.conv = GraphAttention(hidden, levels - 1, heads, dropout=dropout)

    def forward(self, x: Float[Tensor, "n c"], edges: Int[Tensor, "2 e"]) -> Float[Tensor, "n bits"]:
        """Return the logit of each bit; see `ordinal_levels`.

        Args:
            x: embeddings of the generations.
            edges: pairs of generations, in both directions: `GenerationGraph.edge_index`.
        """
        return self.conv(self._nodes(x), edges)

    def attention(
        self, x: Float[Tensor, "n c"], edges: Int[Tensor, "2 e"]
    ) -> tuple[Int[Tensor, "2 f"], Float[Tensor, "f h"]]:
        """Return the edges with a loop for each node behind them, and each head's weight on them."""
        return self.conv.weights(self._nodes(x), edges)

    @classmethod
    def example(cls) -> Self:
        return cls(6, 8, 4)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        random, nodes = torch.Generator().manual_seed(0), 3 * batch
        edges = torch.randint(0, nodes, (2, 2 * nodes), generator=random)
        return torch.randn(nodes, 6, generator=random), torch.cat([edges, edges.flip(0)], 1)

    @classmethod
    def odd_inputs(cls, batch: int) -> tuple[tuple[Tensor, ...], ...]:
        x, edges = cls.example_inputs(batch)
        return (x, edges[:, :0]), (x[:1], edges[:, :0])

    def _nodes(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"x must be embeddings (N, C={self.dim}); got {shown(x)}")
        return self.linear(self.embedder(x))
