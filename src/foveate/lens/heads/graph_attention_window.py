"""Attention over a graph in a prompt: between nodes and text, by hops, along the list, and to linked nodes.

Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data (2025), arXiv 2505.02130. A prompt
lists a node, its neighbours and theirs (`NodeTree`). The paper finds that language models attend to nodes by their
place in the list more than by their links, that shuffled links cost little (`link_use`), and that a window on the graph
in training helps (`foveate.core.graph_window_mask`).

    tree = NodeTree.sample(edges, centre)
    nodes = tree.at_tokens(places, ids.shape[1])            # of each token, -1 for text
    maps = attention_maps(model, ids)[0]
    graph_attention_report(maps, nodes, tree.links()).link_auc

The means over pairs follow the release's notebooks, which leave out weights of exactly 0 where this leaves out pairs
that are hidden. `link_auc` is this project's: the paper compares curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.node_graphs import token_hops


@final
@dataclass(frozen=True, eq=False)
class GraphAttentionReport:
    """The attention between the tokens of a prompt that lists a graph, for each map.

    Means are over the pairs of query and key that the mask allows; NaN where there is none.

    Args:
        node_node, node_text, text_node, text_text: the mean weight from one kind of token (first) to another.
        by_hop: the mean weight between nodes 0, 1, 2 ... links apart. Attention that follows the graph falls from 1 on.
        node_received, text_received: the mean weight on each node's token, of nodes and of text. A first node far above
            the others is a sink; ends above the middle are the paper's U shape.
        by_offset: the mean weight between nodes that stand 0, 1, 2 ... apart in the list. A peak beyond 0 is a skewed
            line.
        link_auc: the chance that a node gives a linked node more weight than an unlinked one, ties by half: 0.5 for
            attention without regard to links. Keys are compared within a query's row, since rows differ in length.
    """

    node_node: Float[Tensor, "*maps"]
    node_text: Float[Tensor, "*maps"]
    text_node: Float[Tensor, "*maps"]
    text_text: Float[Tensor, "*maps"]
    by_hop: Float[Tensor, "*maps k"]
    node_received: Float[Tensor, "*maps m"]
    text_received: Float[Tensor, "*maps m"]
    by_offset: Float[Tensor, "*maps m"]
    link_auc: Float[Tensor, "*maps"]

    @classmethod
    def mean(cls, reports: Sequence[Self]) -> Self:
        """Return the mean over prompts; a prompt with NaN, or with fewer nodes, does not count there."""
        if not reports:
            raise OptionError("reports must hold at least one report; got none")
        tables = ("by_hop", "node_received", "text_received", "by_offset")
        found = dict[str, Tensor]()
        for name in (field.name for field in fields(cls)):
            values: list[Tensor] = [getattr(report, name) for report in reports]
            if name in tables:
                longest = max(value.shape[-1] for value in values)
                values = [F.pad(value, (0, longest - value.shape[-1]), value=torch.nan) for value in values]
            found[name] = torch.stack(values).nanmean(0)
        return cls(**found)


def graph_attention_report(
    attn: Float[Tensor, "*maps t t"], nodes: Int[Tensor, " t"], edges: Int[Tensor, "2 e"], *,
    mask: Bool[Tensor, "t t"] | None = None, hops: int = 4,
) -> GraphAttentionReport:  # fmt: skip
    """Measure the attention of one prompt that lists a graph.

    Args:
        attn: weights, such as those of all layers and heads: `attention_maps(model, ids)[0]`.
        nodes: the node that each token stands for; -1 for text; see `NodeTree.at_tokens`.
        edges: pairs of nodes, in either direction; see `NodeTree.links`.
        mask: the pairs that the model sees, such as `graph_window_mask` gives; None for all but the future.
        hops: the largest distance in `by_hop`; 4 joins any two nodes of the paper's trees.
    """
    if attn.ndim < 2 or attn.shape[-2] != attn.shape[-1] or nodes.shape != attn.shape[-1:]:
        raise ShapeError(f"attn must be weights (..., T, T) and nodes (T,); got {shown(attn)} and {shown(nodes)}")
    t = len(nodes)
    validate.count("hops", hops)
    distance, is_node = token_hops(nodes, edges).to(attn.device), (nodes >= 0).to(attn.device)
    if not len(distance):
        raise OptionError("nodes must name a node for at least one token; got text alone")
    seen = masks.causal(t, t, device=attn.device) if mask is None else mask
    validate.bool_mask("mask", seen, "T, T", (t, t), attn.device)
    seen, at = seen.expand(t, t), is_node.nonzero()[:, 0]
    attn = attn.to(torch.promote_types(attn.dtype, torch.float32))
    rows, visible = attn[..., at[:, None], at], seen[at[:, None], at]
    order = torch.arange(len(at), device=attn.device)
    offset = order[:, None] - order
    kinds = [_mean(attn, seen & query[:, None] & key) for query in (is_node, ~is_node) for key in (is_node, ~is_node)]
    return GraphAttentionReport(
        kinds[0], kinds[1], kinds[2], kinds[3],
        torch.stack([_mean(rows, visible & (distance == hop)) for hop in range(hops + 1)], -1),
        _received(attn, seen & is_node[:, None])[..., at], _received(attn, seen & ~is_node[:, None])[..., at],
        torch.stack([_mean(rows, visible & (offset == step)) for step in range(len(at))], -1),
        _link_auc(rows, visible, distance),
    )  # fmt: skip


def _mean(weights: Float[Tensor, "*maps q k"], pairs: Bool[Tensor, "q k"]) -> Float[Tensor, "*maps"]:
    """Return the mean weight of some pairs; NaN if there is none."""
    return weights[..., pairs].mean(-1)


def _received(weights: Float[Tensor, "*maps q k"], pairs: Bool[Tensor, "q k"]) -> Float[Tensor, "*maps k"]:
    """Return the mean weight on each key over the queries of its pairs; NaN if there is none."""
    return (weights * pairs).sum(-2) / pairs.sum(0)


def _link_auc(
    weights: Float[Tensor, "*maps m m"], visible: Bool[Tensor, "m m"], distance: Int[Tensor, "m m"]
) -> Float[Tensor, "*maps"]:
    """Return the share of a query's pairs of a linked and an unlinked key in which the linked one has more weight."""
    linked, unlinked = visible & (distance == 1), visible & (distance != 1) & (distance != 0)
    wins, pairs = weights.new_zeros(weights.shape[:-2]), 0
    for query in range(len(linked)):
        ours = weights[..., query, linked[query]][..., :, None]
        others = weights[..., query, unlinked[query]][..., None, :]
        wins += ((ours > others).to(wins) + 0.5 * (ours == others).to(wins)).sum((-2, -1))
        pairs += ours.shape[-2] * others.shape[-1]
    return wins / pairs if pairs else torch.full_like(wins, torch.nan)
