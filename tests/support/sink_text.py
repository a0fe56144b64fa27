"""Text on which attention has little to do, so that a sink can emerge."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY, LENGTH = 24, 24


class SinkText:
    """Markov text behind a begin token 0. After one of the first tokens, `triggers` of them, an earlier one returns.

    Elsewhere the next token follows from the last one alone, so that attention has nothing to add.
    """

    def __init__(self, seed: int, triggers: int) -> None:
        self.triggers, self.draw = triggers, torch.Generator().manual_seed(seed)
        self.next = torch.randn(VOCABULARY, VOCABULARY, generator=self.draw).mul(3).softmax(-1)
        self.next[:, 0] = 0.0

    def sample(self, batch: int) -> Tensor:
        ids = torch.zeros(batch, LENGTH, dtype=torch.long)
        for at in range(1, LENGTH):
            last = ids[:, at - 1]
            drawn = torch.multinomial(self.next[last], 1, generator=self.draw)[:, 0]
            copies = (last >= 1) & (last <= self.triggers) & (at > 1)
            ids[:, at] = torch.where(copies, ids[:, at - 2], drawn)
        return ids
