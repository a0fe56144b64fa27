"""Language modelling on text that ships with Python: predict the next byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from foveate.core import validate
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.parts import corpus

#: The beginning-of-sequence token and the vocabulary of the byte tokenizer: 256 bytes and room for special tokens.
BOS, VOCABULARY = 256, 260


@dataclass(frozen=True)
class Language(TrainingTask):
    """Windows of the Python manual as bytes after a beginning-of-sequence token; `heldout` windows come from pages that
    training never sees.

    Args:
        length: N: the beginning-of-sequence token and N - 1 bytes.
    """

    length: int = 128
    vocabulary = VOCABULARY
    name = "lm"

    def __post_init__(self) -> None:
        validate.count("length", self.length, 1)

    def sample(self, count: int, generator: torch.Generator, *, heldout: bool = False) -> tuple[Tensor, Tensor]:
        source = _bytes("heldout" if heldout else "train")
        starts = torch.randint(len(source) - self.length, (count, 1), generator=generator)
        windows = source[starts + torch.arange(self.length)].long()
        return torch.cat([torch.full((count, 1), BOS), windows[:, :-1]], 1), windows


@cache
def _bytes(split: str) -> Tensor:
    return torch.frombuffer(bytearray(corpus.text(split).encode()), dtype=torch.uint8)
