"""Luong's decoder: an LSTM that attends to the source after each step, with the result fed into the next step.

Effective Approaches to Attention-based Neural Machine Translation (2015), arXiv 1508.04025.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.nn.base.seq2seq import Decoded, Encoded, Made, Seq2Seq
from foveate.ops.dense.luong_attention import LuongAttention


class LuongState(NamedTuple):
    """The state of the LSTM's layers, the last h~, and the number of the step."""

    h: Float[Tensor, "b l d"]
    c: Float[Tensor, "b l d"]
    fed: Float[Tensor, "b d"]
    t: Int[Tensor, " b"]


@final
class LuongDecoder(Seq2Seq):
    """`h_t = LSTM(y_{t-1}, h~_{t-1})`, `c_t` its attention over the source, `h~_t = tanh(W [c_t; h_t])`, then a token.

    With input feeding, steps run one by one, in training too; without it, a teacher-forced call is one call of the LSTM
    and one of the attention. The wrong choice for long sequences: O(T) sequential steps.

    Args:
        dim: width of the source's states (the memory), the embeddings and the LSTM (the paper: 1000).
        vocab: target tokens.
        score, mode: see `LuongAttention`.
        input_feeding: True feeds h~ of a step into the next one beside the token.
        layers: layers of the LSTM (the paper: 4).
        dropout: dropout between these layers (the paper: 0.2).
        options: further options of `LuongAttention` (`window`).

    A call's `state` is that of an encoder, `(h, c)`, each `(layers, B, dim)` as `nn.LSTM` returns them; None for zeros.
    All weights start uniformly in ±0.1, as in the paper.
    """

    takes_state = True

    def __init__(
        self,
        dim: int,
        vocab: int,
        score: Literal["dot", "general", "concat", "location"] = "dot",
        mode: Literal["global", "local_m", "local_p"] = "global",
        *,
        input_feeding: bool = True,
        layers: int = 1,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, vocab)
        validate.count("layers", layers, 1)
        validate.one_of("input_feeding", input_feeding, (True, False))
        validate.between("dropout", dropout, 0, 1)
        self.input_feeding = input_feeding
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM((1 + input_feeding) * dim, dim, layers, batch_first=True, dropout=dropout)
        self.attention = LuongAttention(dim, score, mode, **options)
        self.combine = nn.Linear(2 * dim, dim, bias=False)
        self.out = nn.Linear(dim, vocab, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def begin(self, source: Encoded, state: Any) -> LuongState:
        batch, zeros = len(source.memory), source.memory.new_zeros
        h, c = self._given(state, batch) or (zeros(batch, self.lstm.num_layers, self.dim) for _ in range(2))
        return LuongState(h, c, zeros(batch, self.dim), torch.zeros_like(source.mask[:, 0], dtype=torch.long))

    def step(self, token: Int[Tensor, " b"], state: LuongState, source: Encoded) -> Made:
        logits, weights, state = self._advance(token[:, None], state, source)
        return Made(logits[:, 0], weights[:, 0], state)

    def decode(self, tokens: Int[Tensor, "b t"], state: LuongState, source: Encoded) -> Decoded:
        """Without input feeding, compute all steps at once."""
        if self.input_feeding:
            return super().decode(tokens, state, source)
        logits, weights, _ = self._advance(tokens, state, source)
        return Decoded(logits, weights)

    def _advance(self, tokens: Tensor, state: LuongState, source: Encoded) -> tuple[Tensor, Tensor, LuongState]:
        """Take some steps: one with input feeding, any number without."""
        x = self.embed(tokens)
        given = torch.cat([x, state.fed[:, None]], -1) if self.input_feeding else x
        h, (last_h, last_c) = self.lstm(given, tuple(part.transpose(0, 1).contiguous() for part in state[:2]))
        t = torch.arange(tokens.shape[1], device=tokens.device)
        own: dict[str, Any] = {"t": state.t[:1] + t} if "t" in self.attention.capabilities.inputs else {}
        seen = source.mask[:, None, None]
        weights = self.attention.weights(h[:, None], source.memory[:, None], mask=seen, **own)[:, 0]
        fed = torch.tanh(self.combine(torch.cat([weights @ source.memory, h], -1)))
        after = LuongState(last_h.transpose(0, 1), last_c.transpose(0, 1), fed[:, -1], state.t + len(t))
        return self.out(fed), weights, after

    def _given(self, state: Any, batch: int) -> tuple[Tensor, Tensor] | None:
        """Check an encoder's state, and put the batch first."""
        if state is None:
            return None
        shape = (self.lstm.num_layers, batch, self.dim)
        if not isinstance(state, tuple) or [getattr(x, "shape", None) for x in state] != [shape, shape]:
            raise ShapeError(f"state must be (h, c), each (layers, B, D)={shape}; got {shown(state)}")
        return state[0].transpose(0, 1), state[1].transpose(0, 1)

    def example_state(self, batch: int) -> tuple[Tensor, Tensor]:
        h, c = torch.randn(2, self.lstm.num_layers, batch, self.dim, generator=torch.Generator().manual_seed(0))
        return h, c

    @classmethod
    def example(cls, dim: int, vocab: int) -> Self:
        made = cls(dim, vocab, "general", layers=2)
        for parameter in made.parameters():
            nn.init.uniform_(parameter, -0.8, 0.8)
        return made
