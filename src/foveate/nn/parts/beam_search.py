"""Beam search: the likeliest sequences of a decoder, for a batch, several at once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class BeamSearch:
    """The sequences that a beam follows for each example of a batch.

    A caller computes the logits of the next token of all sequences, `B * beams` rows, calls `extend`, and moves what it
    keeps of each sequence to the rows that `extend` returns. One sequence is greedy search. A sequence ends with the
    stop token, or where all logits are -inf; from then on it keeps its probability.

    Args:
        batch: B.
        beams: sequences of an example.
        device: the device of the logits to come.
        stop: the token that ends a sequence; None for none.
    """

    def __init__(self, batch: int, beams: int, device: torch.device, stop: int | None = None) -> None:
        self.stop = stop
        self.total = torch.full((batch, beams), -torch.inf, device=device)
        self.total[:, 0] = 0.0  # sequences start equal: all but one count for nothing until they differ
        self.tokens = torch.zeros(batch * beams, 0, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch * beams, dtype=torch.bool, device=device)
        self._first = torch.arange(batch, device=device)[:, None] * beams

    def extend(self, logits: Float[Tensor, "n v"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return the next token of each sequence, and the row of the sequence that it continues."""
        (batch, beams), vocab = self.total.shape, logits.shape[-1]
        over = self.ended | (logits == -torch.inf).all(-1)
        reached = self.total[..., None] + _gains(logits, over).view(batch, beams, vocab)
        self.total, best = reached.flatten(1).topk(beams, -1)
        row, token = (self._first + best // vocab).flatten(), (best % vocab).flatten()
        over = over[row]
        self.tokens = torch.cat([self.tokens[row], token.masked_fill(over, -1)[:, None]], 1)
        self.ended = over if self.stop is None else over | (token == self.stop)
        return token, row

    def is_over(self) -> bool:
        """Return whether all sequences have met the stop token; this waits for the device."""
        return self.stop is not None and bool(self.ended.all())

    def best(self, steps: int) -> tuple[Int[Tensor, "b t"], Float[Tensor, " b"]]:
        """Return each example's likeliest sequence, with -1 up to `steps` behind its end, and its log-probability."""
        tokens = self.tokens.view(*self.total.shape, -1)[:, 0]
        return F.pad(tokens, (0, steps - tokens.shape[1]), value=-1), self.total[:, 0]


def _gains(logits: Float[Tensor, "n v"], over: Tensor) -> Float[Tensor, "n v"]:
    """Return the log-probability that each token adds, in float32 at least; a sequence that is over adds 0, once."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(over[:, None], 0.0)
    once = torch.arange(logits.shape[-1], device=logits.device) == 0
    stays = torch.where(once, 0.0, -torch.inf).to(wide)
    return torch.where(over[:, None], stays, wide.log_softmax(-1))
