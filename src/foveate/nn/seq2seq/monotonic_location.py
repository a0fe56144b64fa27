"""A GRU encoder-decoder with monotonic location attention, for tests of length generalisation.

Monotonic Location Attention for Length Generalization (2023), arXiv 2305.20019.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.seq2seq import Made, Seq2Seq
from foveate.nn.parts.start_symbol import embedded
from foveate.ops.dense.monotonic_location_attention import MonotonicLocationAttention


class EncodedSource(NamedTuple):
    """The encoded source: a memory for `MonotonicLocationDecoder`."""

    memory: Float[Tensor, "b s c"]
    mask: Bool[Tensor, "b s"]
    state: Float[Tensor, "b c"]  # the decoder's first state


class LocationKeys(NamedTuple):
    """Keys and values of a memory, and its mask."""

    keys: Float[Tensor, "b 1 s c"]
    values: Float[Tensor, "b s c"]
    mask: Bool[Tensor, "b 1 1 s"]


class LocationState(NamedTuple):
    """The state of the decoder's cell, and the expected position of its last look."""

    h: Float[Tensor, "b c"]
    past: Float[Tensor, "b 1 1"]


@final
class MonotonicLocationDecoder(Seq2Seq):
    """A GRU cell that attends by `MonotonicLocationAttention` before each token, with the state before the step.

    As in the release, values pass a linear map and a leaky ReLU, and outputs share the embeddings. The release projects
    both queries and keys of the content part; only their product counts, so only keys are projected here.

    Args:
        dim: width of the memory and of the state.
        vocab, embed, step, mix, past: see `MonotonicLocationSeq2Seq`.

    A token of -1 is the start symbol. A call's `state` is `(B, dim)`; None for zeros.
    """

    has_start = True
    takes_state = True

    def __init__(
        self,
        dim: int,
        vocab: int,
        embed: int = 64,
        *,
        step: Literal["onestep", "relu", "controlled_relu", "softstair", "free"] = "onestep",
        mix: bool = False,
        past: Literal["mixed", "location"] = "mixed",
    ) -> None:
        super().__init__(dim, vocab)
        validate.count("embed", embed, 1)
        self.embed = nn.Embedding(vocab, embed, padding_idx=0)
        self.start = nn.Parameter(torch.randn(embed))
        self.keys, self.values = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.attention = MonotonicLocationAttention(dim, step=step, mix=mix, past=past)
        self.compose = nn.Linear(dim, dim, bias=False)
        self.cell, self.narrow = nn.GRUCell(embed + dim, dim), nn.Linear(dim, embed)
        self.out_bias = nn.Parameter(torch.zeros(vocab))

    def encode(self, memory: Tensor, mask: Tensor) -> LocationKeys:
        return LocationKeys(self.keys(memory)[:, None], F.leaky_relu(self.values(memory)), mask[:, None, None])

    def begin(self, source: LocationKeys, state: Any) -> LocationState:
        shape = source.values.shape[::2]
        if state is None:
            state = source.values.new_zeros(shape)
        if not isinstance(state, Tensor) or state.shape != shape:
            raise ShapeError(f"state must be (B, D)={tuple(shape)}; got {shown(state)}")
        return LocationState(state, state.new_zeros(len(state), 1, 1))

    def step(self, token: Int[Tensor, " b"], state: LocationState, source: LocationKeys) -> Made:
        places = source.values.shape[1]
        one_hot = torch.eye(places, dtype=source.values.dtype, device=token.device).expand(len(token), 1, -1, -1)
        looks, past = self.attention.walk(state.h[:, None, None], source.keys, one_hot, state.past, mask=source.mask)
        weights = looks[:, 0]
        found = self.compose((weights @ source.values)[:, 0])
        h = self.cell(torch.cat([embedded(self.embed, token, self.start), found], -1), state.h)
        logits = F.linear(self.narrow(h), self.embed.weight, self.out_bias)
        return Made(logits, weights[:, 0], LocationState(h, past))

    def example_state(self, batch: int) -> Tensor:
        return torch.randn(batch, self.dim, generator=torch.Generator().manual_seed(0))

    @classmethod
    def example(cls, dim: int, vocab: int) -> Self:
        made = cls(dim, vocab, 6, step="controlled_relu", mix=True)
        assert made.attention.step_bias is not None  # learned by "controlled_relu"
        nn.init.zeros_(made.attention.step_bias)
        for weight in (made.cell.weight_hh, made.narrow.weight):
            nn.init.normal_(weight)
        return made


@final
class MonotonicLocationSeq2Seq(nn.Module):
    """A bidirectional GRU, and a `MonotonicLocationDecoder`.

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

    As in the release, a learned first and last vector frame the source, and both sequences share the embeddings.
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
        self.decoder = MonotonicLocationDecoder(hidden, vocab, embed, step=step, mix=mix, past=past)
        self.first = nn.Parameter(torch.randn(embed))
        self.last = nn.Parameter(torch.randn(embed))
        self.encoder = nn.GRU(embed, hidden // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.direction = nn.Linear(hidden, 1) if mix_direction else None

    def forward(
        self, tokens: Int[Tensor, "b s"], lengths: Int[Tensor, " b"], targets: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t v"]:
        """Return each target's logits given the targets before it; `lengths` counts the real tokens of each row."""
        source = self.read(tokens, lengths)
        given = F.pad(targets[:, :-1], (1, 0), value=-1)
        return self.decoder(source.memory, given, source.mask, source.state).logits

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, lengths: Tensor, steps: int, *, beams: int = 1, stop: int | None = None
    ) -> Int[Tensor, "b t"]:
        """Return the likeliest tokens that a beam finds; see `Seq2Seq.generate`."""
        source = self.read(tokens, lengths)
        return self.decoder.generate(
            source.memory, None, steps, mask=source.mask, state=source.state, beams=beams, stop=stop
        ).tokens

    def read(self, tokens: Int[Tensor, "b s"], lengths: Int[Tensor, " b"]) -> EncodedSource:
        """Encode and frame the source and, with `mix_direction`, mix its directions."""
        if tokens.dim() != 2 or lengths.shape != tokens.shape[:1] or int(lengths.max()) > tokens.shape[1]:
            raise ShapeError(
                f"tokens must be (B, S) and lengths (B,) up to S; got {tuple(tokens.shape)}, {lengths.tolist()}"
            )
        place = torch.arange(tokens.shape[1] + 2, device=tokens.device)
        x = F.pad(self.decoder.embed(tokens), (0, 0, 1, 1))
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
        return EncodedSource(states, place < real[:, None], final_state)


def backwards(x: Float[Tensor, "b s c"], lengths: Int[Tensor, " b"]) -> Float[Tensor, "b s c"]:
    """Reverse each row's first `lengths` vectors; leave the rest in place."""
    place = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - place
    return x.gather(1, torch.where(mirrored >= 0, mirrored, place)[..., None].expand_as(x))
