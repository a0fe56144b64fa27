"""Show, Attend and Tell: an LSTM that looks at a part of an image before each word of a caption.

Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (2015), arXiv 1502.03044. Hard attention
trains with `foveate.train.HardAttentionLoss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import ShapeError, shown
from foveate.core.scoring import safe_softmax
from foveate.nn.base.seq2seq import Made, Seq2Seq
from foveate.nn.parts.start_symbol import embedded
from foveate.ops.functional.additive_score import pair_score
from foveate.ops.functional.normalizers import argmax

#: A choice of locations: the weights `(B, S)` of a step to the weights by which it reads, such as a sample of them.
Choose = Callable[[Tensor], Tensor]


class Annotations(NamedTuple):
    """The annotation vectors, their part of the score, and a mask of real ones."""

    vectors: Float[Tensor, "b s d"]
    keys: Float[Tensor, "b s a"]
    mask: Bool[Tensor, "b s"]


class CellState(NamedTuple):
    """The state of an LSTM cell."""

    h: Float[Tensor, "b n"]
    c: Float[Tensor, "b n"]


class Looked(NamedTuple):
    """The logits of a call, the distributions over locations, and the weights by which it read the locations."""

    logits: Float[Tensor, "b t v"]
    weights: Float[Tensor, "b t s"]
    chosen: Float[Tensor, "b t s"]


@final
class VisualAttentionLSTM(Seq2Seq):
    """`e_ti = v . tanh(W_a a_i + W_h h_{t-1})`, its softmax alpha over locations, and a word from the LSTM's new state.

    The context is `z_t = beta_t sum_i alpha_ti a_i` with the gate `beta_t = sigmoid(w . h_{t-1} + b)`; the LSTM reads
    `[E y_{t-1}, z_t]`, and `L_o (E y_{t-1} + L_h h_t + L_z z_t)` are the logits. The first state is made from the mean
    of the annotation vectors. It suits short texts about images whose words each name a region, and gives maps of these
    regions. O(T S A) time in T sequential steps: the wrong choice for long texts, which a transformer trains on in
    parallel.

    Args:
        feat_dim: D, the width of an annotation vector (the paper: 512 channels of VGG's last convolution, at 14 x 14
            locations, from a network that is not trained).
        hidden: width of the LSTM.
        vocab: number of tokens.
        mode: "soft": the context is the mean of the vectors under alpha. "hard": it is the vector at one location, the
            likeliest one in `forward` and `generate`, a sample in training; see `look`.
        gate: False leaves beta out.
        embed: width of embeddings; None for `hidden`.
        attn_dim: A, the width under the tanh; None for D.
        variant: "paper"; "release" puts a tanh in front of L_o, and biases into L_h, L_z and L_o.

    A token of -1 is the start symbol; its embedding is zero, as in the release. The paper writes the first state as an
    MLP of the mean; it is one layer with a tanh here, as in the release's defaults. At test time the release reads the
    mean of the vectors in both modes; `mode` may be set on a trained model to do so.
    """

    has_start = True

    def __init__(
        self, feat_dim: int, hidden: int, vocab: int, mode: Literal["soft", "hard"] = "soft", gate: bool = True, *,
        embed: int | None = None, attn_dim: int | None = None, variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__(feat_dim, vocab)
        embed, attn_dim = hidden if embed is None else embed, feat_dim if attn_dim is None else attn_dim
        for name, value in {"hidden": hidden, "embed": embed, "attn_dim": attn_dim}.items():
            validate.count(name, value, 1)
        self.hidden, self.mode, self.variant = hidden, mode, variant
        self.first_h, self.first_c = nn.Linear(feat_dim, hidden), nn.Linear(feat_dim, hidden)
        self.w_a, self.w_h = nn.Linear(feat_dim, attn_dim), nn.Linear(hidden, attn_dim, bias=False)
        self.v = nn.Parameter(torch.empty(attn_dim).uniform_(-(attn_dim**-0.5), attn_dim**-0.5))
        self.gate = nn.Linear(hidden, 1) if gate else None
        self.embed = nn.Embedding(vocab, embed)
        self.cell = nn.LSTMCell(embed + feat_dim, hidden)
        biases = variant == "release"
        self.out_h, self.out_z = nn.Linear(hidden, embed, biases), nn.Linear(feat_dim, embed, biases)
        self.out = nn.Linear(embed, vocab, biases)

    def encode(self, memory: Tensor, mask: Tensor) -> Annotations:
        return Annotations(memory, self.w_a(memory), mask)

    def begin(self, source: Annotations, state: Any) -> CellState:
        """Make the first state from the mean of the real annotation vectors."""
        mean = source.vectors.sum(1) / source.mask.sum(1, keepdim=True).clamp(min=1)
        return CellState(torch.tanh(self.first_h(mean)), torch.tanh(self.first_c(mean)))

    def step(self, token: Int[Tensor, " b"], state: CellState, source: Annotations) -> Made:
        weights = self.attend(state.h, source)
        return self._write(token, state, source, weights, weights if self.mode == "soft" else argmax(weights))

    def look(
        self, memory: Float[Tensor, "b s d"], tokens: Int[Tensor, "b t"], choose: Choose,
        mask: Bool[Tensor, "b s"] | None = None,
    ) -> Looked:  # fmt: skip
        """Run over given tokens with locations of the caller's choice, such as samples.

        Args:
            memory, tokens, mask: see `forward`.
            choose: called once a step with alpha `(B, S)`; it returns the weights by which the step reads the vectors.
        """
        source, state = self._begin(memory, mask, None)
        self._check_tokens("tokens", tokens, (len(memory), None), memory)
        steps = []
        for token in tokens.unbind(1):
            weights = self.attend(state.h, source)
            chosen = choose(weights)
            made = self._write(token, state, source, weights, chosen)
            steps.append((made.logits, weights, chosen))
            state = made.state
        return Looked(*(torch.stack(parts, 1) for parts in zip(*steps, strict=True)))

    def attend(self, h: Float[Tensor, "b n"], source: Annotations) -> Float[Tensor, "b s"]:
        """Return alpha, the distribution over locations of a step that starts from the state `h`."""
        scores = pair_score(self.w_h(h)[:, None], source.keys, self.v)[:, 0]
        return safe_softmax(scores.masked_fill(~source.mask, masks.NEG_INF))

    def _write(self, token: Tensor, state: CellState, source: Annotations, weights: Tensor, chosen: Tensor) -> Made:
        """Read the vectors by the chosen weights, take a step, and return the logits of the next token."""
        context = (chosen[:, None] @ source.vectors)[:, 0]
        if self.gate is not None:
            context = torch.sigmoid(self.gate(state.h)) * context
        word = embedded(self.embed, token, 0.0)
        h, c = self.cell(torch.cat([word, context], -1), (state.h, state.c))
        mixed = word + self.out_h(h) + self.out_z(context)
        return Made(self.out(torch.tanh(mixed) if self.variant == "release" else mixed), weights, CellState(h, c))

    @classmethod
    def example(cls, dim: int, vocab: int) -> Self:
        made = cls(dim, 6, vocab, embed=5, attn_dim=7)
        nn.init.normal_(made.v)
        return made


def doubly_stochastic_penalty(
    weights: Float[Tensor, "b t s"], lam: float = 1.0, *, mask: Bool[Tensor, "b s"] | None = None,
    written: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return `lam` times the sum over locations of `(1 - sum_t alpha_ti)^2`, in the mean over examples.

    Added to the loss of soft attention, it asks a caption to look at every location about equally.

    Args:
        weights: alpha of every step.
        lam: its factor (the paper: 1).
        mask: True for the real locations; None for all.
        written: True for the steps of a caption's real words; None for all.
    """
    validate.at_least("lam", lam, 0)
    if not isinstance(weights, Tensor) or weights.dim() != 3:
        raise ShapeError(f"weights must be (B, T, S); got {shown(weights)}")
    batch, steps, places = weights.shape
    if written is not None:
        validate.bool_mask("written", written, "B, T", (batch, steps), weights.device)
        weights = weights.masked_fill(~written.expand(batch, steps)[..., None], 0.0)
    missing = 1 - weights.sum(1)
    if mask is not None:
        validate.bool_mask("mask", mask, "B, S", (batch, places), weights.device)
        missing = missing.masked_fill(~mask.expand(batch, places), 0.0)
    return lam * missing.square().sum(-1).mean()
