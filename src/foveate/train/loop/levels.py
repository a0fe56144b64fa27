"""The training of a network that gives nodes of a graph ordered levels.

Leveraging Graph Structures to Detect Hallucinations in Large Language Models (2024), arXiv 2407.04485.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.models.graph.ordinal_levels import level_scores, ordinal_bits, ordinal_levels


def fit_levels(
    network: nn.Module, x: Float[Tensor, "n c"], edges: Int[Tensor, "2 e"], levels: Int[Tensor, " n"],
    train: Int[Tensor, " m"], *, validation: Int[Tensor, " v"] | None = None, count: int = 4, epochs: int = 500,
    lr: float = 1e-3, decay: float = 5e-4,
) -> list[float]:  # fmt: skip
    """Train a network on all nodes at once, in place, with the binary cross entropy of the bits of some; return losses.

    Adam. With `validation` the network keeps the weights with the best macro recall on these nodes, the first of equal
    ones. The release means to, but what it saves follows the training, so that its weights are the last.

    Args:
        network: maps `(x, edges)` to logits `(N, count - 1)`, such as `HallucinationGAT`.
        x, edges: the graph. `GenerationGraph.within(train)` keeps edges of other nodes out of the training.
        levels: of all nodes, 0..count-1; those outside `train` and `validation` are not read.
        train, validation: numbers of nodes.
        count: the number of levels.
        epochs, lr, decay: the release's values; decay is an L2 penalty.
    """
    validate.count("epochs", epochs, 1)
    if levels.shape != x.shape[:1]:
        raise ShapeError(f"levels must be (N={len(x)},), one for each node; got {shown(levels)}")
    bits, losses = ordinal_bits(levels[train], count).to(x), list[float]()
    optimiser = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=decay)
    best, kept = -1.0, None
    for _ in range(epochs):
        network.train()
        loss = F.binary_cross_entropy_with_logits(network(x, edges)[train], bits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if validation is not None and (recall := _recall(network, x, edges, levels, validation, count)) > best:
            best, kept = recall, copy.deepcopy(network.state_dict())
    if kept is not None:
        network.load_state_dict(kept)
    network.eval()
    return losses


@torch.no_grad()
def _recall(network: nn.Module, x: Tensor, edges: Tensor, levels: Tensor, nodes: Tensor, count: int) -> float:
    network.eval()
    return level_scores(ordinal_levels(network(x, edges)[nodes]), levels[nodes], count).recall
