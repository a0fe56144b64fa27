"""The base class of sequence-to-sequence decoders: tokens are made one after the other, each from a look at a memory.

The memory is what was encoded: the words of a sentence, the cells of an image. The base class trains with given tokens,
and generates greedily or with a beam; subclasses define `start` and `step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown

#: What a decoder carries from step to step: a nest of tensors `(B, ...)`.
State = Any


class Decoded(NamedTuple):
    """The logits of the token after each given token, and the weights over the memory that made them."""

    logits: Float[Tensor, "b t v"]
    weights: Float[Tensor, "b t s"]


class Made(NamedTuple):
    """The logits and the weights of one step, and the state after it."""

    logits: Float[Tensor, "b v"]
    weights: Float[Tensor, "b s"]
    state: State


class Generated(NamedTuple):
    """Generated tokens, -1 behind a stop token, and the log-probability of each sequence."""

    tokens: Int[Tensor, "b t"]
    log_prob: Float[Tensor, " b"]


class Seq2Seq(Checked, nn.Module, ABC):
    """A decoder that attends to a memory before each token.

    Attributes:
        dim: D, the width of the memory.
        vocab: V, the number of tokens.
    """

    def __init__(self, dim: int, vocab: int) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("vocab", vocab, 1)
        self.dim, self.vocab = dim, vocab

    def forward(
        self, memory: Float[Tensor, "b s d"], tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b s"] | None = None
    ) -> Decoded:
        """Return the logits after each of some given tokens (teacher forcing).

        Args:
            memory: what is attended to, `(B, S, D)`.
            tokens: the tokens so far, beginning with a start token.
            mask: True for the real vectors of the memory; None for all.
        """
        memory, mask = self._memory(memory, mask)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or len(tokens) != len(memory) or not tokens.shape[1]:
            raise ShapeError(f"tokens must be (B={len(memory)}, T) with T > 0; got {shown(tokens)}")
        state, logits, weights = self.start(memory, mask), [], []
        for token in tokens.unbind(1):
            made = self.step(token, state, memory, mask)
            logits.append(made.logits)
            weights.append(made.weights)
            state = made.state
        return Decoded(torch.stack(logits, 1), torch.stack(weights, 1))

    @torch.no_grad()
    def generate(
        self, memory: Float[Tensor, "b s d"], first: Int[Tensor, " b"], steps: int, *,
        mask: Bool[Tensor, "b s"] | None = None, beams: int = 1, stop: int | None = None,
    ) -> Generated:  # fmt: skip
        """Return the likeliest continuation that a beam finds.

        Args:
            memory, mask: see `forward`.
            first: the start token of each sequence.
            steps: most tokens to make.
            beams: sequences that are followed at once; 1 takes the likeliest token of each step.
            stop: the token that ends a sequence; None for none.
        """
        validate.count("steps", steps, 1)
        validate.count("beams", beams, 1)
        memory, mask = self._memory(memory, mask)
        batch, device = len(memory), memory.device
        memory, token = memory.repeat_interleave(beams, 0), first.repeat_interleave(beams, 0)
        mask = None if mask is None else mask.repeat_interleave(beams, 0)
        state = self.start(memory, mask)
        total = memory.new_full((batch, beams), -torch.inf)
        total[:, 0] = 0.0  # beams start equal: all but one count for nothing until they differ
        found = torch.empty(batch, beams, 0, dtype=torch.long, device=device)
        ended = torch.zeros(batch * beams, dtype=torch.bool, device=device)
        offset = torch.arange(batch, device=device)[:, None] * beams
        for _ in range(steps):
            made = self.step(token, state, memory, mask)
            gains = made.logits.log_softmax(-1)
            stays = torch.full_like(gains, -torch.inf)
            stays[:, 0] = 0.0  # a sequence that has ended goes on in one way
            gains = torch.where(ended[:, None], stays, gains)
            reached = (total.view(-1, 1) + gains).view(batch, -1)
            total, best = reached.topk(beams, -1)
            row = (offset + best // self.vocab).flatten()
            token = (best % self.vocab).flatten()
            was_ended = ended[row]
            shown_token = token.masked_fill(was_ended, -1).view(batch, beams, 1)
            found = torch.cat([found.flatten(0, 1)[row].view(batch, beams, -1), shown_token], -1)
            state = tree_map(lambda x, row=row: x[row], made.state)
            ended = was_ended | (token == stop) if stop is not None else was_ended
            if bool(ended.all()):
                break
        return Generated(found[:, 0], total[:, 0])

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, dim: int, vocab: int) -> Self:
        """Make an instance of these sizes, in which the mechanism has an effect; tests run it."""
        return cls(dim, vocab)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, memory: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"] | None) -> State:
        """Return the state in front of the first token."""

    @abstractmethod
    def step(
        self, token: Int[Tensor, " b"], state: State, memory: Float[Tensor, "b s d"],
        mask: Bool[Tensor, "b s"] | None,
    ) -> Made:  # fmt: skip
        """Read one token, attend to the memory, and return the logits of the next token."""

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _memory(self, memory: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(memory, Tensor) or memory.dim() != 3 or memory.shape[-1] != self.dim:
            raise ShapeError(f"memory must be (B, S, D={self.dim}); got {shown(memory)}")
        if mask is None:
            return memory, None
        validate.bool_mask("mask", mask, "B, S", tuple(memory.shape[:2]), memory.device)
        mask = mask.expand(memory.shape[:2])
        return memory.masked_fill(~mask[..., None], 0.0), mask
