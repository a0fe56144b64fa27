"""A graph of what language models wrote, with an edge between two texts whose embeddings are similar.

Leveraging Graph Structures to Detect Hallucinations in Large Language Models (2024), arXiv 2407.04485.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown

_ROWS = 1024


@final
class GenerationGraph:
    """The graph of all generations, across questions: an edge where the cosine of two embeddings reaches a threshold.

    Costs O(N² D) time, and memory for the edges alone. Generations without a similar one stay, without edges.

    Args:
        embeddings: a vector for each generation; see `generation_embeddings`.
        threshold: the least cosine of an edge. The release takes 0.85, for another encoder 0.55.

    Attributes:
        edge_index: both directions of each edge, `(2, E)`, without loops.
        similarity: the cosine of each, `(E,)`. `HallucinationGAT` does not read it, as in the release.
    """

    edge_index: Int[Tensor, "2 e"]
    similarity: Float[Tensor, " e"]

    def __init__(self, embeddings: Float[Tensor, "n d"], threshold: float = 0.85) -> None:
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise ShapeError(f"embeddings must be numbers (N, D); got {shown(embeddings)}")
        validate.between("threshold", threshold, -1.0, 1.0)
        unit, edges, cosines = F.normalize(embeddings.detach(), dim=-1), list[Tensor](), list[Tensor]()
        for start in range(0, len(unit), _ROWS):
            cosine = unit[start : start + _ROWS] @ unit.mT
            row, column = (cosine >= threshold).nonzero(as_tuple=True)
            before = column < row + start
            row, column = row[before], column[before]
            edges.append(torch.stack([row + start, column]))
            cosines.append(cosine[row, column])
        below = torch.cat(edges, 1) if edges else torch.empty(2, 0, dtype=torch.int64, device=unit.device)
        self.edge_index = torch.cat([below, below.flip(0)], 1)
        self.similarity = torch.cat([*cosines, *cosines]) if cosines else unit.new_empty(0)
        self.nodes = len(unit)

    def within(self, nodes: Int[Tensor, " m"]) -> Int[Tensor, "2 e"]:
        """Return the edges between some nodes alone, numbered as before.

        A network that is trained on `within(train)` and asked on `edge_index` has seen no edge of the other nodes. The
        release means to hide these, but changes only edge attributes that its network ignores: all edges train it.
        """
        if nodes.numel() and not 0 <= int(nodes.min()) <= int(nodes.max()) < self.nodes:
            raise OptionError(f"nodes must be in 0..{self.nodes - 1}; got {int(nodes.min())}..{int(nodes.max())}")
        return self.edge_index[:, torch.isin(self.edge_index, nodes).all(0)]


class Split(NamedTuple):
    """The nodes that train a network, choose its weights, and test it."""

    train: Int[Tensor, " a"]
    validation: Int[Tensor, " b"]
    test: Int[Tensor, " c"]


def split_nodes(count: int, seed: int = 42, shares: tuple[float, float] = (0.7, 0.15)) -> Split:
    """Return a random split of nodes 0..count-1.

    Args:
        count: the number of nodes.
        seed: of the order. The release's split has the same shares and another order, that of NumPy's seed 42.
        shares: of the nodes that train and that validate, rounded down; the others test.
    """
    validate.count("count", count, 1)
    for share in (*shares, sum(shares)):
        validate.between("shares", share, 0.0, 1.0)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, validation = (int(share * count) for share in shares)
    return Split(*order.split([train, validation, count - train - validation]))


@torch.no_grad()
def generation_embeddings(
    model: nn.Module, tokenizer: Callable[..., Any], texts: Sequence[str], *, prefix: str = "[CLS] ", batch: int = 32
) -> Float[Tensor, "n d"]:
    """Return the last state of each text's first token, which is `[CLS]` for a BERT.

    Args:
        model: an encoder of transformers, without a head.
        tokenizer: its tokenizer, which pads on the right.
        texts: the generations.
        prefix: put before each text. The release writes "[CLS] " there, so that the encoder reads the token twice;
            "" leaves it to the tokenizer.
        batch: texts to encode at once.
    """
    validate.count("batch", batch, 1)
    if not texts:
        raise OptionError("texts must hold at least one text; got none")
    device, found = next(model.parameters()).device, list[Tensor]()
    for start in range(0, len(texts), batch):
        inputs = tokenizer([prefix + text for text in texts[start : start + batch]], return_tensors="pt", padding=True)
        found.append(model(**inputs.to(device)).last_hidden_state[:, 0])
    return torch.cat(found)
