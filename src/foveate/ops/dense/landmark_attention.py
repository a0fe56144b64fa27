"""Landmark attention: a token at the end of each block decides how much weight the block gets.

Landmark Attention: Random-Access Infinite Context Length for Transformers (2023), arXiv 2305.16300.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.scoring import Tile, safe_softmax
from foveate.ops.base.scored import Scored
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class LandmarkAttention(Scored):
    """A softmax in two levels over blocks of `block` tokens and one landmark behind them.

    A query compares the ordinary keys of its own block with the landmarks of all earlier blocks, in one softmax. The
    weight of an earlier landmark is shared among the ordinary keys of its block, by a softmax over that block. So
    `W_ij = P_block(j) P(landmark)` in an earlier block, and `W_ij = P(j)` in the query's own. Landmarks have no weight
    of their own, and a landmark's query does not see itself. Rows sum to 1.

    Cost O(N² D), without a fused kernel. With `top_k` only the best earlier landmarks of each query and head keep a
    weight, as when a model reads a long context block by block; this operator still scores all keys, so that `top_k`
    serves to measure what such a memory loses. A model has to be trained, or fine-tuned in all weights, with landmarks
    in its input (`with_landmarks`); the loss leaves them out as targets. The wrong choice for a model that was not.

    Args:
        block: ordinary tokens in a block; tokens `block`, `2 block + 1`, ... are landmarks. The paper has 50 from
            scratch, its release 63 for LLaMA.
        top_k: earlier blocks that a query reads; None for all, as in training. The release has 5.

    A block whose ordinary keys are all hidden gets no weight. The memory's positions, which keep the distance to
    retrieved blocks within the length of training, belong to a cache and are left out.

    Raises:
        OptionError: an option that is no whole number, or is below 1.
    """

    capabilities = replace(Scored.capabilities, patterns=CAUSAL_PATTERNS)

    def __init__(self, block: int = 63, top_k: int | None = None) -> None:
        super().__init__()
        validate.count("block", block, 1)
        validate.count("top_k", 1 if top_k is None else top_k, 1)
        self.block, self.top_k = block, top_k

    def normalize(self, logits: Tensor, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        size, n = self.block + 1, logits.shape[-1]
        cells = F.pad(logits, (0, -n % size), value=masks.NEG_INF).unflatten(-1, (-1, size))
        keys, landmark = cells[..., :-1], cells[..., -1]
        inside = safe_softmax(keys)
        empty = (keys == masks.NEG_INF).all(-1)
        total = torch.logsumexp(keys.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty, masks.NEG_INF)
        own = torch.arange(cells.shape[-2], device=logits.device) == at.rows[:, None] // size
        gates = torch.where(own, total, self._best(landmark.masked_fill(empty | own, masks.NEG_INF)))
        weights = inside * safe_softmax(gates)[..., None]
        return F.pad(weights, (0, 1)).flatten(-2)[..., :n]

    def _best(self, landmarks: Float[Tensor, "b h q i"]) -> Float[Tensor, "b h q i"]:
        """Hide all but the `top_k` best landmarks of each query."""
        if self.top_k is None or self.top_k >= landmarks.shape[-1]:
            return landmarks
        best = landmarks.detach().topk(self.top_k, dim=-1).indices
        kept = torch.zeros_like(landmarks, dtype=torch.bool).scatter(-1, best, True)
        return landmarks.masked_fill(~kept, masks.NEG_INF)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=2)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=length)


def with_landmarks(ids: Int[Tensor, "b n"], block: int, landmark: int) -> Int[Tensor, "b m"]:
    """Insert the id of the landmark token behind every `block` tokens of `ids`; a short last block gets none.

    Raises:
        OptionError: a block below 1, or a landmark below 0.
    """
    validate.count("block", block, 1)
    validate.count("landmark", landmark)
    whole = ids.shape[1] // block * block
    blocks = F.pad(ids[:, :whole].unflatten(1, (-1, block)), (0, 1), value=landmark)
    return torch.cat([blocks.flatten(1), ids[:, whole:]], 1)
