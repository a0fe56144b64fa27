"""A GRU encoder-decoder with monotonic location attention, for tests of length generalisation.

Monotonic Location Attention for Length Generalization (2023), arXiv 2305.20019.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.ops.dense.monotonic_location_attention import MonotonicLocationAttention


class EncodedSource(NamedTuple):
    """The encoded source."""

    keys: Float[Tensor, "b 1 s c"]
    values: Float[Tensor, "b 1 s c"]
    mask: Bool[Tensor, "b 1 1 s"]
    state: Float[Tensor, "b c"]  # the decoder's first state


@final
class MonotonicLocationSeq2Seq(nn.Module):
    """A bidirectional GRU, and a GRU cell that attends by `MonotonicLocationAttention` before each token.

    It suits tasks whose output follows the input's order, at lengths beyond those of training. O(S T) time in S + T
    sequential steps: the wrong choice if speed or reordering matters.

    Args:
        vocab: number of tokens, shared by both sequences; 0 is padding.
        hidden: width of the states, even: half for each direction.
        embed: width of embeddings.
        step, mix, past: options of the attention.
        mix_direction: True reads the source in a learned mix of directions, `beta h + (1 - beta) reversed(h)`, with
            `beta = sigmoid(5 w . final state)` for each example: one model then copies and reverses.
        dropout: dropout on the encoded source (the release: 0.5).

    As in the release, a learned first and last vector frame the source, values pass a linear map and a leaky ReLU, the
    decoder's state before its step is the query, and outputs share the embeddings. The release projects both queries
    and keys of the content part; only their product counts, so only keys are projected here.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int = 128,
        *,
        embed: int = 64,
        step: Literal["onestep", "relu", "controlled_relu", "softstair", "free"] = "onestep",
        mix: bool = False,
        past: Literal["mixed", "location"] = "mixed",
        mix_direction: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        for name, value in {"vocab": vocab, "hidden": hidden, "embed": embed}.items():
            validate.count(name, value, 1)
        if hidden % 2:
            raise OptionError(f"hidden={hidden} must be even: half for each direction")
        validate.one_of("mix_direction", mix_direction, (True, False))
        validate.between("dropout", dropout, 0, 1)
        self.embed = nn.Embedding(vocab, embed, padding_idx=0)
        self.first = nn.Parameter(torch.randn(embed))
        self.last = nn.Parameter(torch.randn(embed))
        self.start = nn.Parameter(torch.randn(embed))
        self.encoder = nn.GRU(embed, hidden // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.direction = nn.Linear(hidden, 1) if mix_direction else None
        self.keys, self.values = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden)
        self.attention = MonotonicLocationAttention(hidden, step=step, mix=mix, past=past)
        self.compose = nn.Linear(hidden, hidden, bias=False)
        self.cell, self.narrow = nn.GRUCell(embed + hidden, hidden), nn.Linear(hidden, embed)
        self.out_bias = nn.Parameter(torch.zeros(vocab))

    def forward(
        self, tokens: Int[Tensor, "b s"], lengths: Int[Tensor, " b"], targets: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t v"]:
        """Return each target's logits given the targets before it; `lengths` counts the real tokens of each row."""
        source, word, past, out = self.read(tokens, lengths), self.start.expand(len(tokens), -1), None, []
        h = source.state
        for target in targets.unbind(1):
            h, past, logits = self._step(word, h, past, source)
            out.append(logits)
            word = self.embed(target)
        return torch.stack(out, 1)

    @torch.no_grad()
    def generate(self, tokens: Tensor, lengths: Tensor, steps: int) -> Int[Tensor, "b t"]:
        """Return the most probable token of each step."""
        validate.count("steps", steps, 1)
        source, word, past, out = self.read(tokens, lengths), self.start.expand(len(tokens), -1), None, []
        h = source.state
        for _ in range(steps):
            h, past, logits = self._step(word, h, past, source)
            out.append(logits.argmax(-1))
            word = self.embed(out[-1])
        return torch.stack(out, 1)

    def read(self, tokens: Int[Tensor, "b s"], lengths: Int[Tensor, " b"]) -> EncodedSource:
        """Encode and frame the source and, with `mix_direction`, mix its directions."""
        if tokens.dim() != 2 or lengths.shape != tokens.shape[:1] or int(lengths.max()) > tokens.shape[1]:
            raise ShapeError(
                f"tokens must be (B, S) and lengths (B,) up to S; got {tuple(tokens.shape)}, {lengths.tolist()}"
            )
        place = torch.arange(tokens.shape[1] + 2, device=tokens.device)
        x = F.pad(self.embed(tokens), (0, 0, 1, 1))
        for vector, at in ((self.first, torch.zeros_like(lengths)), (self.last, lengths + 1)):
            x = torch.where((place == at[:, None])[..., None], vector, x)
        real = lengths + 2
        packed = nn.utils.rnn.pack_padded_sequence(x, real.cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=len(place))
        states, final_state = self.dropout(states), last.transpose(0, 1).flatten(1)
        if self.direction is not None:
            forwards = torch.sigmoid(5 * self.direction(final_state))[..., None]
            states = forwards * states + (1 - forwards) * backwards(states, real)
        values = F.leaky_relu(self.values(states))
        seen = place < real[:, None]
        return EncodedSource(self.keys(states)[:, None], values[:, None], seen[:, None, None], final_state)

    def _step(
        self, word: Tensor, h: Tensor, past: Tensor | None, source: EncodedSource
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state after a step, the expected position, and the logits of a token."""
        found, past = self.attention.walk(h[:, None, None], source.keys, source.values, past, mask=source.mask)
        h = self.cell(torch.cat([word, self.compose(found[:, 0, 0])], -1), h)
        return h, past, F.linear(self.narrow(h), self.embed.weight, self.out_bias)


def backwards(x: Float[Tensor, "b s c"], lengths: Int[Tensor, " b"]) -> Float[Tensor, "b s c"]:
    """Reverse each row's first `lengths` vectors; leave the rest in place."""
    place = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - place
    return x.gather(1, torch.where(mirrored >= 0, mirrored, place)[..., None].expand_as(x))
