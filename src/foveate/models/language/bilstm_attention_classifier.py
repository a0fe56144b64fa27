"""A text classifier with a bidirectional LSTM and additive attention, whose scores can be perturbed.

Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training (2020), arXiv 2009.12064.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown
from foveate.core.scoring import safe_softmax
from foveate.nn.parts.packed_rnn import run_rnn
from foveate.ops.functional.alignment import Feature


class TextRead(NamedTuple):
    """The classes' scores of texts, and the attention that made them.

    Args:
        logits: scores of the classes.
        scores: attention's scores of the tokens before padding is hidden, without a bias.
        weights: attention's weights, 0 at padding.
    """

    logits: Float[Tensor, "b classes"]
    scores: Float[Tensor, "b t"]
    weights: Float[Tensor, "b t"]


@final
class BiLSTMAttentionClassifier(Checked, nn.Module):
    """`out(sum_t a_t h_t)` with `a = softmax_t(v . tanh(W h_t + b))` and h the states of a bidirectional LSTM.

    It is linear in the length of a text, and recurrent. The paper's base model for single texts; its form for
    questions adds a question vector inside the tanh. The wrong choice where a pretrained encoder is at hand.

    Args:
        vocabulary: number of tokens.
        classes: number of classes; the release has one logit for two classes.
        dim: width of the embeddings.
        hidden: width of the LSTM in each direction. The attention inside the tanh has the same width.
        padding: the token that fills texts up; what follows the last other token is not read.
    """

    def __init__(
        self, vocabulary: int, classes: int = 2, *, dim: int = 300, hidden: int = 128, padding: int = 0
    ) -> None:
        super().__init__()
        for name, value in dict(vocabulary=vocabulary, classes=classes, dim=dim, hidden=hidden).items():
            validate.count(name, value, 1)
        validate.between("padding", padding, 0, vocabulary - 1)
        self.padding = padding
        self.embedding = nn.Embedding(vocabulary, dim)
        self.encoder = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.align = Feature(1, 2 * hidden, hidden)
        self.out = nn.Linear(2 * hidden, classes)

    def forward(self, ids: Int[Tensor, "b t"], score_bias: Float[Tensor, "b t"] | None = None) -> TextRead:
        """Read texts.

        Args:
            ids: tokens, filled up at the end with `padding`.
            score_bias: added to attention's scores.
        """
        mask = self.score_mask(ids)
        return self.attend(self.encode(self.embedding(ids), mask), mask, score_bias)

    def score_mask(self, ids: Int[Tensor, "b t"], **_: Any) -> Bool[Tensor, "b t"]:
        """Return True for the tokens whose scores count: all up to the last one that is no padding."""
        if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.dim() != 2 or not ids.shape[1]:
            raise ShapeError(f"ids must be token ids (B, T); got {shown(ids)}")
        return ((ids != self.padding).flip(1).cumsum(1) > 0).flip(1)

    def encode(self, embedded: Float[Tensor, "b t c"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t h"]:
        """Return the states of embedded texts, 0 at padding."""
        return run_rnn(self.encoder, embedded, mask.sum(1))

    def attend(
        self, hidden: Float[Tensor, "b t h"], mask: Bool[Tensor, "b t"], score_bias: Tensor | None = None
    ) -> TextRead:
        """Read states."""
        scores = self.align.own(hidden[:, None])[:, 0]
        biased = scores if score_bias is None else scores + score_bias.to(scores)
        weights = safe_softmax(biased.masked_fill(~mask, masks.NEG_INF))
        return TextRead(self.classify(hidden, weights), scores, weights)

    def classify(self, states: Float[Tensor, "b t h"], weights: Float[Tensor, "b t"]) -> Float[Tensor, "b classes"]:
        """Return the classes' scores of states under given weights."""
        return self.out((weights[:, None] @ states).squeeze(1))

    @classmethod
    def example(cls) -> Self:
        """Make a small classifier; tests run it."""
        return cls(20, dim=6, hidden=4)
