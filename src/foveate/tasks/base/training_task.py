"""The seam of training tasks: batches of tokens without end, and a score for what a model says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

#: The label of a position where nothing is asked.
IGNORED = -100
#: The seed of what is held out, unless another one is named.
HELDOUT = 2**31 - 1


class Drill(ABC):
    """What a small network is trained on. `tokens (B, N)` come with `labels (B, N)`: what to say there, or -100.

    A system writes `sample`. Training draws from the given generator; what is held out draws from its own seed, and
    from other data where the drill has a corpus.
    """

    name: ClassVar[str]
    vocabulary: int
    length: int

    @abstractmethod
    def sample(
        self, count: int, generator: torch.Generator, *, heldout: bool = False
    ) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        """`count` sequences and their labels."""

    def heldout(self, count: int, seed: int = HELDOUT) -> tuple[Tensor, Tensor]:
        """The same sequences for the same seed, which training never draws from."""
        return self.sample(count, torch.Generator().manual_seed(seed), heldout=True)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the asked positions where the likeliest token is the label."""
    asked = labels != IGNORED
    return (logits.argmax(-1) == labels)[asked].double().mean().item()
