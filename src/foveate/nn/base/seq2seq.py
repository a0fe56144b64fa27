"""The base class of sequence-to-sequence decoders: tokens are made one after the other, each from a look at a memory.

The memory is what a decoder attends to: the words of a sentence, the cells of an image. The base class trains with
given tokens, and generates greedily or with a beam; subclasses define `begin` and `step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.parts.beam_search import BeamSearch
from foveate.nn.parts.start_symbol import checked_tokens

#: What the steps of a call read, and what goes from step to step: nests of tensors `(B, ...)`.
Source = Any
State = Any


class Encoded(NamedTuple):
    """A memory with zeros outside its mask, and the mask."""

    memory: Float[Tensor, "b s d"]
    mask: Bool[Tensor, "b s"]


class Decoded(NamedTuple):
    """The logits after each given token, and the weights over the memory, and over learned vectors behind it."""

    logits: Float[Tensor, "b t v"]
    weights: Float[Tensor, "b t s"]


class Made(NamedTuple):
    """The logits and the weights of one step, and the state after it."""

    logits: Float[Tensor, "b v"]
    weights: Float[Tensor, "b s"]
    state: State


class Generated(NamedTuple):
    """Generated tokens, -1 behind the end of a sequence, and the log-probability of each sequence."""

    tokens: Int[Tensor, "b t"]
    log_prob: Float[Tensor, " b"]


class Seq2Seq(Checked, nn.Module, ABC):
    """A decoder that attends to a memory before each token.

    Attributes:
        dim: D, the width of the memory.
        vocab: V, the number of tokens; None where it depends on the memory.
        has_start: whether the decoder has a start symbol of its own, which a token of -1 stands for.
        takes_state: whether a call may bring the first state, such as the last one of an encoder.
    """

    has_start: ClassVar[bool] = False
    takes_state: ClassVar[bool] = False

    def __init__(self, dim: int, vocab: int | None) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("vocab", 1 if vocab is None else vocab, 1)
        self.dim, self.vocab = dim, vocab

    def forward(
        self, memory: Float[Tensor, "b s d"], tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b s"] | None = None,
        state: Any = None,
    ) -> Decoded:  # fmt: skip
        """Return the logits after each of some given tokens (teacher forcing).

        Args:
            memory: the vectors to attend to, `(B, S, D)`.
            tokens: the tokens so far, beginning with a start token.
            mask: True for the real vectors of the memory; None for all. The others have no effect.
            state: the first state, for a decoder that takes one.

        Raises:
            ShapeError: a malformed memory or mask, or tokens that are none of the decoder's.
            OptionError: a state for a decoder that takes none.
        """
        source, state = self._begin(memory, mask, state)
        self._check_tokens("tokens", tokens, (len(memory), None), memory)
        return self.decode(tokens, state, source)

    @torch.no_grad()
    def generate(
        self, memory: Float[Tensor, "b s d"], first: Int[Tensor, " b"] | None, steps: int, *,
        mask: Bool[Tensor, "b s"] | None = None, state: Any = None, beams: int = 1, stop: int | None = None,
    ) -> Generated:  # fmt: skip
        """Return the likeliest continuation that a beam finds.

        Args:
            memory, mask, state: see `forward`.
            first: the start token of each sequence; None for the decoder's own start symbol.
            steps: tokens to make.
            beams: sequences that are followed at once; 1 takes the likeliest token of each step.
            stop: the token that ends a sequence; None for none.
        """
        validate.count("steps", steps, 1)
        validate.count("beams", beams, 1)
        source, state = self._begin(memory, mask, state)
        if first is None and self.has_start:
            first = torch.full((len(memory),), -1, device=memory.device)
        first = self._check_tokens("first", first, (len(memory),), memory)
        if stop is not None:
            validate.count("stop", stop, 0)
            validate.between("stop", stop, 0, self.vocab_of(memory) - 1)
        return self._search(first, state, source, BeamSearch(len(memory), beams, memory.device, stop), steps)

    def _search(self, token: Tensor, state: State, source: Source, search: BeamSearch, steps: int) -> Generated:
        beams = search.total.shape[1]
        token, state, source = tree_map(lambda x: x.repeat_interleave(beams, 0), (token, state, source))
        for _ in range(steps):
            made = self.step(token, state, source)
            token, row = search.extend(made.logits)
            state = tree_map(lambda x, row=row: x[row], made.state)
            if search.is_over():
                break
        return Generated(*search.best(steps))

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, dim: int, vocab: int) -> Self:
        """Make an instance of these sizes, in which the mechanism has an effect; tests run it."""
        return cls(dim, vocab)

    def example_state(self, batch: int) -> Any:
        """Make a first state that a call may bring, where the decoder takes one; tests run it."""
        raise NotImplementedError(f"{self.name} takes no state")

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def vocab_of(self, memory: Tensor) -> int:
        """Return the number of tokens of a call."""
        assert self.vocab is not None, f"{self.name} has to define vocab_of"
        return self.vocab

    def encode(self, memory: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"]) -> Source:
        """Return what all steps of a call read; override it to project the memory once. Hidden vectors are zeros."""
        return Encoded(memory, mask)

    @abstractmethod
    def begin(self, source: Source, state: Any) -> State:
        """Return the state in front of the first token, from that of the call; None where the call has none."""

    @abstractmethod
    def step(self, token: Int[Tensor, " b"], state: State, source: Source) -> Made:
        """Read one token, attend to the source, and return the logits of the next token."""

    def decode(self, tokens: Int[Tensor, "b t"], state: State, source: Source) -> Decoded:
        """Take a step for each token; override it where all steps can be computed at once."""
        logits, weights = [], []
        for token in tokens.unbind(1):
            made = self.step(token, state, source)
            logits.append(made.logits)
            weights.append(made.weights)
            state = made.state
        return Decoded(torch.stack(logits, 1), torch.stack(weights, 1))

    # -- refusals ------------------------------------------------------------------------------------------------------

    def _begin(self, memory: Tensor, mask: Tensor | None, state: Any) -> tuple[Source, State]:
        if not isinstance(memory, Tensor) or memory.dim() != 3 or memory.shape[-1] != self.dim or not memory.shape[1]:
            raise ShapeError(f"memory must be (B, S, D={self.dim}) with S > 0; got {shown(memory)}")
        if state is not None and not self.takes_state:
            raise OptionError(f"state={shown(state)} must be None: {self.name} makes its first state from the memory")
        if mask is None:
            mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        validate.bool_mask("mask", mask, "B, S", tuple(memory.shape[:2]), memory.device)
        mask = mask.expand(memory.shape[:2])
        source = self.encode(memory.masked_fill(~mask[..., None], 0.0), mask)
        return source, self.begin(source, state)

    def _check_tokens(self, name: str, tokens: Tensor | None, shape: tuple[int | None, ...], memory: Tensor) -> Tensor:
        return checked_tokens(name, tokens, shape, -int(self.has_start), self.vocab_of(memory) - 1)
