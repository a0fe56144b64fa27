"""The base class of training tasks: an endless supply of batches, and the accuracy on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

#: The label of a position without a target.
IGNORED = -100
#: The default seed of held-out batches.
HELDOUT = 2**31 - 1


class TrainingTask(ABC):
    """A task that a small network is trained on.

    `sample` gives `tokens (B, N)` and `labels (B, N)`: the token to predict at each position, or -100 for none.
    Subclasses define it. Training draws from the given generator; held-out batches draw from a seed of their own, and
    from other data if the task has a corpus.
    """

    name: ClassVar[str]
    vocabulary: int
    length: int

    @abstractmethod
    def sample(
        self, count: int, generator: torch.Generator, *, heldout: bool = False
    ) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
        """Draw `count` sequences and their labels."""

    def heldout(self, count: int, seed: int = HELDOUT) -> tuple[Tensor, Tensor]:
        """Return the held-out batch of this seed; training never draws it."""
        return self.sample(count, torch.Generator().manual_seed(seed), heldout=True)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of the labelled positions where the likeliest token is the label."""
    labelled = labels != IGNORED
    return (logits.argmax(-1) == labels)[labelled].double().mean().item()
