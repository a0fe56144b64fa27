"""Pointer Networks: the weights of attention are the output, a distribution over the inputs.

Pointer Networks (2015), arXiv 1506.03134.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.base.seq2seq import Made, Seq2Seq
from foveate.nn.parts.beam_search import BeamSearch
from foveate.ops.functional.additive_score import pair_score


class Pointed(NamedTuple):
    """Log-probabilities of each output over the slots, and the chosen slots (-1: none was left)."""

    log_probs: Float[Tensor, "b s m"]
    indices: Int[Tensor, "b s"]


def pointer_scores(
    e: Float[Tensor, "b n h"], d: Float[Tensor, "b s h"], w1: Float[Tensor, "a h"], w2: Float[Tensor, "a h"],
    v: Float[Tensor, " a"], mask: Bool[Tensor, "b _ n"] | None = None,
) -> Float[Tensor, "b s n"]:  # fmt: skip
    """Return `log softmax_j(v . tanh(W_1 e_j + W_2 d_i))`, the log-probability that output i is input j.

    They suit any network whose answer is a position in its input (copying, extractive question answering).

    Args:
        e: representations of the inputs `(B, N, h)`.
        d: representations of the outputs so far `(B, S, h)`.
        mask: bool `(B, 1, N)` or `(B, S, N)`, True for inputs that may be chosen; a row without any is -inf.
    """
    if mask is not None:
        validate.bool_mask("mask", mask, "B, S, N", (e.shape[0], d.shape[1], e.shape[1]), e.device)
    return _log_softmax(pair_score(d @ w2.mT, e @ w1.mT, v), mask)


class Slots(NamedTuple):
    """The slots of a call: the inputs, and one more that ends the output where the network has it."""

    keys: Float[Tensor, "b m h"]  # their representations
    fed: Float[Tensor, "b m c"]  # the decoder's input after the choice of each slot; the start symbol is the last one
    real: Bool[Tensor, "b m"]
    h: Float[Tensor, "b h"]  # the decoder's first state
    c: Float[Tensor, "b h"]
    once: Bool[Tensor, " b"]  # whether an input may be chosen only once


class PointerState(NamedTuple):
    """The state of the decoder's cell, and the slots that may still be chosen."""

    h: Float[Tensor, "b h"]
    c: Float[Tensor, "b h"]
    allowed: Bool[Tensor, "b m"]


@final
class PointerNetwork(Seq2Seq):
    """An LSTM reads the inputs, and another LSTM points at them, one after the other.

    It suits outputs that are orders, subsets or positions of any number of inputs: hulls, tours, sorting, spans.
    Nothing in it depends on N, so it runs on more inputs than in training. O(N S h²) time, one output after the other.
    The wrong choice if outputs come from a vocabulary.

    Args:
        in_dim: width of an input.
        hidden: h of both LSTMs; the paper's are 256 and 512.
        stop: True adds a slot, number N, that ends the output. Without it there are as many outputs as inputs, unless a
            call gives `steps`.

    The memory of `forward` and `generate` is the inputs, the tokens are slots, -1 starts, and the logits are
    log-probabilities of slots; nothing but the stop slot follows a stop. `point` and `beam` take lengths and targets,
    and can choose each input once.

    The decoder starts from the encoder's last state and a learned symbol; its next input is the chosen one. Weights
    start uniform in ±0.08 as in the paper, which trains with plain SGD (rate 1, batches of 128, gradients clipped to a
    norm of 2). The representation of the stop slot (a learned vector) is reconstructed.
    """

    has_start = True

    def __init__(self, in_dim: int = 2, hidden: int = 256, *, stop: bool = True) -> None:
        validate.count("in_dim", in_dim, 1)
        super().__init__(in_dim, None)
        validate.count("hidden", hidden, 1)
        self.in_dim, self.hidden = in_dim, hidden
        self.encoder = nn.LSTM(in_dim, hidden, batch_first=True)
        self.decoder = nn.LSTMCell(in_dim, hidden)
        self.w1, self.w2 = nn.Parameter(torch.empty(hidden, hidden)), nn.Parameter(torch.empty(hidden, hidden))
        self.v, self.start = nn.Parameter(torch.empty(hidden)), nn.Parameter(torch.empty(in_dim))
        self.stop = nn.Parameter(torch.empty(hidden)) if stop else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.08, 0.08)

    def point(
        self, inputs: Float[Tensor, "b n c"], targets: Int[Tensor, "b s"] | None = None, *,
        lengths: Int[Tensor, " b"] | None = None, mask_visited: bool = False, steps: int | None = None,
    ) -> Pointed:  # fmt: skip
        """Point under teacher forcing if `targets` are given, and greedily otherwise.

        Args:
            inputs: `(B, N, C)`.
            targets: slots `(B, S)`; N is the stop slot, -1 follows the end and does not enter the loss.
            lengths: numbers of real inputs; None for all.
            mask_visited: True never chooses an input twice. With targets, it masks those that a target has visited.
            steps: number of outputs S without targets; None for N, and one more to stop.
        """
        slots = self._slots(inputs, targets, lengths, steps, mask_visited)
        steps = inputs.shape[1] + self._extra if steps is None else steps
        state, taken = self.begin(slots, None), torch.full_like(slots.once, -1, dtype=torch.long)
        log_probs, indices = [], []
        for step in range(steps if targets is None else targets.shape[1]):
            made = self._advance(taken, state, slots, stopping=targets is None)
            state = made.state
            best = made.logits.argmax(-1).masked_fill(~state.allowed.any(-1), -1)
            log_probs.append(made.logits)
            indices.append(best)
            taken = best if targets is None else targets[:, step]
        return Pointed(torch.stack(log_probs, 1), torch.stack(indices, 1))

    @torch.no_grad()
    def beam(
        self, inputs: Float[Tensor, "b n c"], width: int, *, lengths: Int[Tensor, " b"] | None = None,
        mask_visited: bool = False, steps: int | None = None,
    ) -> tuple[Int[Tensor, "b s"], Float[Tensor, " b"]]:  # fmt: skip
        """Return the best outputs that a beam of `width` finds, and their log-probability. A width of 1 is greedy."""
        validate.count("width", width, 1)
        slots = self._slots(inputs, None, lengths, steps, mask_visited)
        search = BeamSearch(len(inputs), width, inputs.device)
        first = torch.full_like(slots.once, -1, dtype=torch.long)
        steps = inputs.shape[1] + self._extra if steps is None else steps
        found = self._search(first, self.begin(slots, None), slots, search, steps)
        return found.tokens, found.log_prob

    @property
    def _extra(self) -> int:
        return 0 if self.stop is None else 1

    def vocab_of(self, memory: Tensor) -> int:
        return memory.shape[1] + self._extra

    def encode(self, memory: Tensor, mask: Tensor) -> Slots:
        """Run the encoder over the real inputs, in their order."""
        order = mask.logical_not().argsort(dim=-1, stable=True)[..., None]  # the real ones in front
        lengths = mask.sum(-1).clamp(min=1)
        in_front = memory.gather(1, order.expand_as(memory))
        packed = pack_padded_sequence(in_front, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, (h, c) = self.encoder(packed)
        keys = pad_packed_sequence(read, batch_first=True, total_length=memory.shape[1])[0]
        keys = torch.zeros_like(keys).scatter(1, order.expand_as(keys), keys)
        fed = torch.cat([memory, self.start.expand(len(memory), 1, -1)], 1)
        if self.stop is not None:
            keys = torch.cat([keys, self.stop.expand(len(memory), 1, -1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return Slots(keys, fed, mask, h[0], c[0], torch.zeros_like(mask[:, 0]))

    def begin(self, source: Slots, state: Any) -> PointerState:
        return PointerState(source.h, source.c, source.real)

    def step(self, token: Int[Tensor, " b"], state: PointerState, source: Slots) -> Made:
        return self._advance(token, state, source, stopping=True)

    def _advance(self, taken: Tensor, state: PointerState, slots: Slots, stopping: bool) -> Made:
        """Return the log-probabilities of slots behind `taken`; `stopping` lets only a stop follow a stop."""
        allowed = self._after(state.allowed, taken, slots.once, stopping)
        h, c = self.decoder(_at(slots.fed, taken), (state.h, state.c))
        scores = pointer_scores(slots.keys, h[:, None], self.w1, self.w2, self.v, allowed[:, None])[:, 0]
        return Made(scores, scores.exp(), PointerState(h, c, allowed))

    def _after(self, allowed: Tensor, taken: Tensor, once: Tensor, stopping: bool) -> Bool[Tensor, "b m"]:
        """Return a mask of the slots that may be chosen next; a stopped output stays stopped."""
        slot = torch.arange(allowed.shape[1], device=taken.device)
        stopped = torch.zeros_like(taken, dtype=torch.bool)
        last = torch.zeros_like(slot, dtype=torch.bool)
        if self.stop is not None:
            last = slot == allowed.shape[1] - 1
            stopped = (taken == allowed.shape[1] - 1) & stopping
        allowed = allowed & ((slot != taken[:, None]) | last | ~once[:, None])
        return torch.where(stopped[:, None], last, allowed)

    def _slots(
        self, inputs: Tensor, targets: Tensor | None, lengths: Tensor | None, steps: int | None, once: bool
    ) -> Slots:
        """Validate inputs; read them."""
        lengths = self._check(inputs, targets, lengths, steps)
        real = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        slots = self.encode(inputs.masked_fill(~real[..., None], 0.0), real)
        return slots._replace(once=torch.full_like(slots.once, once))

    @classmethod
    def example(cls, dim: int, vocab: int) -> Self:
        """Make a network without a stop slot, whose tokens are the memory's vectors, whatever `vocab` says."""
        made = cls(dim, 6, stop=False)
        for parameter in made.parameters():
            nn.init.normal_(parameter)
        return made

    def _check(self, inputs: Tensor, targets: Tensor | None, lengths: Tensor | None, steps: int | None) -> Tensor:
        """Validate inputs; return lengths."""
        if inputs.dim() != 3 or inputs.shape[-1] != self.in_dim or inputs.shape[1] == 0:
            raise ShapeError(f"inputs must be (B, N, C={self.in_dim}) with N > 0; got {tuple(inputs.shape)}")
        batch, n, _ = inputs.shape
        if lengths is None:
            lengths = torch.full((batch,), n, device=inputs.device)
        if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > n)).any()):
            raise ShapeError(f"lengths must be (B={batch},), each in 1..{n}; got {lengths.tolist()}")
        if steps is not None:
            validate.count("steps", steps, 1)
        if targets is None:
            return lengths
        if steps is not None:
            raise OptionError(f"steps={steps} must be None with targets, which set the number of steps")
        if targets.dim() != 2 or len(targets) != batch or targets.shape[1] == 0:
            raise ShapeError(f"targets must be (B={batch}, S) with S > 0; got {tuple(targets.shape)}")
        if bool(((targets < -1) | (targets >= n + self._extra)).any()):
            raise ShapeError(f"targets must be slots in 0..{n + self._extra - 1}, or -1")
        return lengths


def pointer_loss(pointed: Pointed, targets: Int[Tensor, "b s"]) -> Float[Tensor, ""]:
    """Return the mean of `-log p(target)` over all targets that are not -1."""
    known = targets >= 0
    picked = pointed.log_probs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return -picked[known].mean()


def _at(fed: Float[Tensor, "b m c"], taken: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
    """Return the decoder's next input: the chosen slot, or the start symbol after a stop or an empty choice."""
    last = fed.shape[1] - 1
    row = torch.where(taken < 0, last, taken.clamp(max=last))
    return fed[torch.arange(len(fed), device=fed.device), row]


def _log_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the log-softmax over allowed entries; a row without any is -inf."""
    if mask is None:
        return torch.log_softmax(logits, -1)
    return torch.log_softmax(logits.masked_fill(~mask, masks.NEG_INF), -1).masked_fill(~mask, masks.NEG_INF)
