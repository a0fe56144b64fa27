"""Copying: a random string, a separator, and the string again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.training_task import IGNORED, TrainingTask


@dataclass(frozen=True)
class Copying(TrainingTask):
    """`x_1 ... x_n 0 x_1 ... x_n`: from the separator on, every next token is determined. A state has to hold all n.

    Args:
        vocabulary: number of tokens; 0 is the separator.
        length: N, the length of the inputs, even; `n = N / 2`.
    """

    vocabulary: int = 32
    length: int = 64
    name = "copy"

    def __post_init__(self) -> None:
        validate.count("vocabulary", self.vocabulary, 3)
        validate.count("length", self.length, 2)
        if self.length % 2:
            raise OptionError(
                f"length={self.length} must be even: the string, a separator and the string but for its last token"
            )

    def sample(self, count: int, generator: torch.Generator, *, heldout: bool = False) -> tuple[Tensor, Tensor]:
        half = self.length // 2
        string = torch.randint(1, self.vocabulary, (count, half), generator=generator)
        separator = torch.zeros(count, 1, dtype=torch.long)
        whole = torch.cat([string, separator, string], 1)
        labels = whole[:, 1:].clone()
        labels[:, :half] = IGNORED
        return whole[:, :-1], labels
