"""The graph window: in a prompt that lists a graph, a node sees the nodes that are a few links away.

Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data (2025), arXiv 2505.02130. The
analyses of that paper are in `foveate.lens`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.node_graphs import token_hops


def graph_window_mask(
    nodes: Int[Tensor, " t"], edges: Int[Tensor, "2 e"], k: int | None = 2, *, bidirectional: bool = False,
    causal: bool = True,
) -> Bool[Tensor, "t t"]:  # fmt: skip
    """Return the mask (True = may attend) in which nodes see the nodes at most `k` links away. Text is unrestricted.

    `k=1` is the fixed neighbourhood of a graph network's layer, `k=None` the model's own attention. The paper trains
    with a window in between and predicts with the whole one. Write `as_bias(mask, dtype)` where a model wants numbers.

    Args:
        nodes: the node that each token stands for; -1 for text. Tokens of the same node see each other. In the release
            each mention of a node is a node of its own (`NodeTree`), and the mention in the question counts as text.
        edges: pairs of nodes, in either direction; paths run through nodes of the prompt alone.
        k: the number of links in the longest path that a node sees along, the paper's global linkage horizon; 0 for
            the node alone, None for all nodes, joined by a path or not.
        bidirectional: True lets a node see later nodes of its window too.
        causal: False lets all other pairs see each other, and nodes their whole window.

    Raises:
        ShapeError, OptionError: malformed nodes or edges, or a `k` that is no whole number.

    The release adds -6000 where this mask forbids a pair of nodes. The weights are the same, since a node sees itself.
    """
    if k is not None:
        validate.count("k", k)
    validate.flag("bidirectional", bidirectional)
    validate.flag("causal", causal)
    hops, t, device = token_hops(nodes, edges), len(nodes), nodes.device
    seen = masks.causal(t, t, device=device) if causal else torch.ones(t, t, dtype=torch.bool, device=device)
    at = (nodes >= 0).nonzero()[:, 0]
    pairs = at[:, None], at
    near = torch.ones_like(hops, dtype=torch.bool) if k is None else (hops >= 0) & (hops <= k)
    return seen.index_put(pairs, near if bidirectional else near & seen[pairs])
