"""Several pass keys in long text, requested in order: the data that identifies retrieval heads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import validate
from foveate.tasks.parts.corpus import text
from foveate.tasks.text.needle import snap

NATO = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


@dataclass(frozen=True)
class Passkeys:
    """An endless stream of `(ids (1, N), answers (1, N) bool)`: word sequences hidden in text, then requested.

    Args:
        encode: turns text into token ids, without special tokens.
        length: approximate tokens of the surrounding text.
        count: number of pass keys, at depths from 0.05 to 0.95; at most 10.
        words: words in each pass key (from the NATO alphabet).
        begin: token ids to start with, such as the beginning-of-sequence token.
        seed: the seed of words and text.
    """

    encode: Callable[[str], list[int]]
    length: int = 1024
    count: int = 10
    words: int = 32
    begin: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        validate.at_least("length", self.length, 64)
        validate.between("count", self.count, 1, len(_ORDINALS))
        validate.at_least("words", self.words, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = random.Random(self.seed)
        while True:
            yield self._example(draw)

    def _example(self, draw: random.Random) -> tuple[Tensor, Tensor]:
        keys = [" ".join(draw.choices(NATO, k=self.words)) for _ in range(self.count)]
        source = text("train")
        start = draw.randrange(len(source) - self.length)
        filler = source[start : start + self.length]
        body, last = "", 0
        for index, key in enumerate(keys):
            depth = 0.05 + 0.9 * index / max(1, self.count - 1)
            cut = snap(filler, int(depth * len(filler)))
            body += filler[last:cut] + f" The {_ORDINALS[index]} pass key is {key}."
            last = max(cut, last)
        ids = [*self.begin, *self.encode(body + filler[last:])]
        answers = [False] * len(ids)
        for index, key in enumerate(keys):
            question, answer = self.encode(f"\nThe {_ORDINALS[index]} pass key is"), self.encode(f" {key}.")
            ids += question + answer
            answers += [False] * len(question) + [True] * len(answer)
        return torch.tensor([ids]), torch.tensor([answers])
