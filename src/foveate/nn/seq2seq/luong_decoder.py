"""Luong's decoder: an LSTM that attends to the source after each step, with the result fed into the next step.

Effective Approaches to Attention-based Neural Machine Translation (2015), arXiv 1508.04025.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.ops.dense.luong_attention import LuongAttention

State = tuple[Tensor, Tensor]


@final
class LuongDecoder(nn.Module):
    """`h_t = LSTM(y_{t-1}, h~_{t-1})`, `c_t` its attention over the source, `h~_t = tanh(W [c_t; h_t])`, then a token.

    With input feeding, steps run one by one, in training too; without it, a teacher-forced call is one call of the LSTM
    and one of the attention. The wrong choice for long sequences: O(T) sequential steps.

    Args:
        dim: width of the source's states, the embeddings and the LSTM (the paper: 1000).
        vocab: target tokens.
        score, mode: see `LuongAttention`.
        input_feeding: True feeds h~ of a step into the next one beside the token.
        layers: layers of the LSTM (the paper: 4).
        dropout: dropout between these layers (the paper: 0.2).
        options: further options of `LuongAttention` (`window`).

    All weights start uniformly in ±0.1, as in the paper.
    """

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
        super().__init__()
        for name, value in {"dim": dim, "vocab": vocab, "layers": layers}.items():
            validate.count(name, value, 1)
        validate.one_of("input_feeding", input_feeding, (True, False))
        validate.between("dropout", dropout, 0, 1)
        self.dim, self.input_feeding = dim, input_feeding
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM((1 + input_feeding) * dim, dim, layers, batch_first=True, dropout=dropout)
        self.attention = LuongAttention(dim, score, mode, **options)
        self.combine = nn.Linear(2 * dim, dim, bias=False)
        self.out = nn.Linear(dim, vocab, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(
        self,
        source: Float[Tensor, "b s c"],
        tokens: Int[Tensor, "b t"],
        state: State | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Return the logits of the token after each of `tokens`, which are all given.

        Args:
            source: the states of the source sentence.
            tokens: target tokens, beginning with a start mark.
            state: the LSTM's state, `(layers, B, dim)` twice, from the encoder; None for zeros.
            mask: bool `(B, 1, 1, S)`, True for the real source tokens.
        """
        return self.out(self._run(source, tokens, state, mask)[1])

    def align(
        self, source: Tensor, tokens: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "b t s"]:
        """Return each step's weights over the source, with `tokens` as in a call."""
        h, _ = self._run(source, tokens, state, mask)
        return self.attention.weights(h[:, None], source[:, None], mask=mask)[:, 0]

    @torch.no_grad()
    def generate(
        self, source: Tensor, start: Int[Tensor, " b"], steps: int, state: State | None = None,
        mask: Tensor | None = None,
    ) -> Int[Tensor, "b t"]:  # fmt: skip
        """Return the most probable token of each of `steps` steps after `start`."""
        validate.count("steps", steps, 1)
        fed, token, generated = source.new_zeros(len(source), 1, self.dim), start[:, None], []
        for t in range(steps):
            _, fed, state = self._step(self.embed(token), fed, source, state, mask, t)
            token = self.out(fed).argmax(-1)
            generated.append(token)
        return torch.cat(generated, 1)

    def _run(self, source: Tensor, tokens: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return h and h~ of every step, `(B, T, C)`."""
        if source.dim() != 3 or source.shape[::2] != (len(tokens), self.dim):
            raise ShapeError(f"source must be (B, S, C) with B={len(tokens)}, C={self.dim}; got {tuple(source.shape)}")
        x, fed, steps = self.embed(tokens), source.new_zeros(len(source), 1, self.dim), []
        if not self.input_feeding:
            return self._step(x, fed, source, state, mask, 0)[:2]
        for t in range(tokens.shape[1]):
            h, fed, state = self._step(x[:, t : t + 1], fed, source, state, mask, t)
            steps.append((h, fed))
        h, attentional = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
        return h, attentional

    def _step(
        self, x: Tensor, fed: Tensor, source: Tensor, state: State | None, mask: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor, State]:
        """Run some steps from number `first` on: one with input feeding, any number without."""
        h, state = self.lstm(torch.cat([x, fed], -1) if self.input_feeding else x, state)
        own = (
            {"t": torch.arange(first, first + x.shape[1], device=x.device)}
            if self.attention.capabilities.inputs
            else {}
        )
        if mask is not None:
            validate.key_mask(mask, source.shape[0], source.shape[1], source.device)
        keys = source[:, None]
        context = self.attention(h[:, None], keys, keys, mask=mask, **own)[:, 0]
        return h, torch.tanh(self.combine(torch.cat([context, h], -1))), state
