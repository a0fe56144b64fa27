"""Hierarchical attention (HAN): words are pooled to sentences, and sentences to the document."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.nn.base.pool import Pool, Pooled
from foveate.nn.parts.packed_rnn import run_rnn
from foveate.ops.functional.alignment import Feature


class Read(NamedTuple):
    """A document's vector `(B, 2 hidden)`, the weights of words in their sentence, and of sentences in the document."""

    document: Float[Tensor, "b c"]
    words: Float[Tensor, "b s w"]
    sentences: Float[Tensor, "b s"]


@final
class HierarchicalAttention(nn.Module):
    """Attention over the words of each sentence, and again over the sentences: two levels of abstraction.

    It classifies documents, and its weights show which words and sentences count. It is linear in the words, but
    recurrent: a bidirectional GRU reads each level before it is pooled. The wrong choice for documents that fit into a
    transformer's context.

    Args:
        dim: width of the word vectors.
        hidden: width of the GRUs in each direction, 50 in HAN. The attention of both levels has a hidden width of
            `2 hidden`.

    The survey's (1904.02874) example of more than one level, Hierarchical Attention Networks for Document
    Classification (2016).
    """

    def __init__(self, dim: int, hidden: int = 50) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("hidden", hidden, 1)
        self.dim, width = dim, 2 * hidden
        self.word_encoder = nn.GRU(dim, hidden, batch_first=True, bidirectional=True)
        self.word_pool = AttentionPool(width)
        self.sentence_encoder = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.sentence_pool = AttentionPool(width)

    def forward(self, x: Float[Tensor, "b s w c"], lengths: Int[Tensor, "b s"] | None = None) -> Read:
        """Read documents.

        Args:
            x: word vectors `(B, S, W, C)`.
            lengths: words in each sentence; 0 for missing sentences, which come last in a document.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x must be (B, S, W, C={self.dim}); got {tuple(x.shape)}")
        lengths = torch.full(x.shape[:2], x.shape[2], device=x.device) if lengths is None else lengths
        if lengths.shape != x.shape[:2]:
            raise ShapeError(f"lengths must be {tuple(x.shape[:2])}; got {tuple(lengths.shape)}")
        real = lengths > 0
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ShapeError("lengths of 0 must come last in each document")
        known = _up_to(lengths.flatten(), x.shape[2])
        tokens = x.flatten(0, 1).masked_fill(~known[..., None], 0.0)
        words = self.word_pool.read(run_rnn(self.word_encoder, tokens, lengths.flatten()), known)
        sentences = run_rnn(self.sentence_encoder, words.vectors[:, 0].unflatten(0, x.shape[:2]), real.sum(-1))
        document = self.sentence_pool.read(sentences, real)
        return Read(document.vectors[:, 0], words.weights[:, 0].unflatten(0, x.shape[:2]), document.weights[:, 0])


@final
class AttentionPool(Pool):
    """A mean over n with weights `softmax_n(w . tanh(W x_n + b))`.

    Over several embeddings of one token, in place of N tokens, it is the survey's multi-representational attention.

    Args:
        dim: C, the width of tokens and of the vector.
        hidden: hidden width under the tanh; None for C.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__(dim)
        self.align = Feature(1, dim, hidden)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        weights = self._softmax(self.align.own(x[:, None]), mask)
        return Pooled(weights @ x, weights)


def _up_to(lengths: Tensor, size: int) -> Bool[Tensor, "b n"]:
    return torch.arange(size, device=lengths.device) < lengths[:, None]
