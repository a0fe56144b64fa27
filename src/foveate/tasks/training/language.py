"""Language modelling on text that every Python brings: the next byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from foveate.core import validate
from foveate.tasks.base.training_task import Drill
from foveate.tasks.parts import corpus

#: The mark, and all tokens: 256 bytes and room for marks, as the byte tokenizer has them.
BOS, VOCABULARY = 256, 260


@dataclass(frozen=True)
class Language(Drill):
    """Windows of the Python manual, byte by byte after a mark of the beginning; `heldout` windows come from pages that
    training never sees.

    Args:
        length: N, the mark and N - 1 bytes.
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
