"""Pointer Networks: the weights of attention are the output, a distribution over the inputs.

Pointer Networks (2015), arXiv 1506.03134.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.ops.functional.additive_score import pair_score

State = tuple[Tensor, Tensor]  # of an LSTM cell


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


@final
class PointerNetwork(nn.Module):
    """An LSTM reads the inputs, and another LSTM points at them, one after the other.

    It suits outputs that are orders, subsets or positions of any number of inputs: hulls, tours, sorting, spans.
    Nothing in it depends on N, so it runs on more inputs than in training. O(N S h²) time, one output after the other.
    The wrong choice if outputs come from a vocabulary.

    Args:
        in_dim: width of an input.
        hidden: h of both LSTMs; the paper's are 256 and 512.
        stop: True adds a slot, number N, that ends the output. Without it there are as many outputs as inputs, unless a
            call gives `steps`.

    The decoder starts from the encoder's last state and a learned symbol; its next input is the chosen one. Weights
    start uniform in ±0.08 as in the paper, which trains with plain SGD (rate 1, batches of 128, gradients clipped to a
    norm of 2). The representation of the stop slot (a learned vector) is reconstructed.
    """

    def __init__(self, in_dim: int = 2, hidden: int = 256, *, stop: bool = True) -> None:
        super().__init__()
        validate.count("in_dim", in_dim, 1)
        validate.count("hidden", hidden, 1)
        validate.one_of("stop", stop, (True, False))
        self.in_dim, self.hidden = in_dim, hidden
        self.encoder = nn.LSTM(in_dim, hidden, batch_first=True)
        self.decoder = nn.LSTMCell(in_dim, hidden)
        self.w1, self.w2 = nn.Parameter(torch.empty(hidden, hidden)), nn.Parameter(torch.empty(hidden, hidden))
        self.v, self.start = nn.Parameter(torch.empty(hidden)), nn.Parameter(torch.empty(in_dim))
        self.stop = nn.Parameter(torch.empty(hidden)) if stop else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.08, 0.08)

    def forward(
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
        lengths = self._check(inputs, targets, lengths, steps)
        steps = inputs.shape[1] + self._extra if steps is None else steps
        encoded, state, fed, allowed = self._read(inputs, lengths)
        given, log_probs, indices = self.start.expand(len(inputs), -1), [], []
        for step in range(steps if targets is None else targets.shape[1]):
            scores, state = self._point(encoded, given, state, allowed)
            best = scores.argmax(-1).masked_fill(~allowed.any(-1), -1)
            log_probs.append(scores)
            indices.append(best)
            taken = best if targets is None else targets[:, step]
            given, allowed = _at(fed, taken), self._after(allowed, taken, mask_visited, targets is None)
        return Pointed(torch.stack(log_probs, 1), torch.stack(indices, 1))

    @torch.no_grad()
    def beam(
        self, inputs: Float[Tensor, "b n c"], width: int, *, lengths: Int[Tensor, " b"] | None = None,
        mask_visited: bool = False, steps: int | None = None,
    ) -> tuple[Int[Tensor, "b s"], Float[Tensor, " b"]]:  # fmt: skip
        """Return the best outputs that a beam of `width` finds, and their log-probability. A width of 1 is greedy."""
        validate.count("width", width, 1)
        lengths = self._check(inputs, None, lengths, steps)
        steps = inputs.shape[1] + self._extra if steps is None else steps
        batch = len(inputs)
        encoded, (h, c), fed, allowed = self._read(inputs, lengths)
        encoded, h, c, fed, allowed = (x.repeat_interleave(width, 0) for x in (encoded, h, c, fed, allowed))
        state: State = h, c
        given = self.start.expand(batch * width, -1)
        total = inputs.new_full((batch, width), masks.NEG_INF)
        total[:, 0] = 0.0  # beams start equal: all but one have probability 0 until they differ
        found = torch.empty(batch, width, 0, dtype=torch.long, device=inputs.device)
        first = torch.arange(batch, device=inputs.device)[:, None] * width
        for _ in range(steps):
            scores, state = self._point(encoded, given, state, allowed)
            over = ~allowed.any(-1)
            reached = (total.flatten()[:, None] + scores.masked_fill(over[:, None], 0.0)).view(batch, width, -1)
            total, best = reached.flatten(1).topk(width, -1)
            origin, slot = best // scores.shape[-1], best % scores.shape[-1]
            row = (first + origin).flatten()
            slot = slot.masked_fill(over[row].view_as(slot), -1)
            found = torch.cat([found.gather(1, origin[..., None].expand(-1, -1, found.shape[2])), slot[..., None]], -1)
            state, taken = (state[0][row], state[1][row]), slot.flatten()
            given, allowed = _at(fed, taken), self._after(allowed[row], taken, mask_visited, True)
        return found[:, 0], total[:, 0]

    @property
    def _extra(self) -> int:
        return 0 if self.stop is None else 1

    def _read(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, State, Tensor, Tensor]:
        """Return the slots as keys, the decoder's state, its input for each slot, and a mask of valid slots."""
        packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, (h, c) = self.encoder(packed)
        slots = pad_packed_sequence(read, batch_first=True, total_length=inputs.shape[1])[0]
        real = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        fed = torch.cat([inputs.masked_fill(~real[..., None], 0.0), self.start.expand(len(inputs), 1, -1)], 1)
        if self.stop is not None:
            slots = torch.cat([slots, self.stop.expand(len(inputs), 1, -1)], 1)
            real = torch.cat([real, real.new_ones(len(inputs), 1)], 1)
        return slots, (h[0], c[0]), fed, real

    def _point(self, slots: Tensor, given: Tensor, state: State, allowed: Tensor) -> tuple[Tensor, State]:
        state = self.decoder(given, state)
        scores = pointer_scores(slots, state[0][:, None], self.w1, self.w2, self.v, allowed[:, None])
        return scores.squeeze(1), state

    def _after(self, allowed: Tensor, taken: Tensor, mask_visited: bool, stopping: bool) -> Bool[Tensor, "b m"]:
        """Return a mask of the slots that may be chosen next; a stopped output stays stopped."""
        slot = torch.arange(allowed.shape[1], device=taken.device)
        stopped = torch.zeros_like(taken, dtype=torch.bool)
        last = torch.zeros_like(slot, dtype=torch.bool)
        if self.stop is not None:
            last = slot == allowed.shape[1] - 1
            stopped = (taken == allowed.shape[1] - 1) & stopping
        if mask_visited:
            allowed = allowed & ((slot != taken[:, None]) | last)
        return torch.where(stopped[:, None], last, allowed)

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
