"""Common words: which words of a long list stand there most often. A kind of RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from foveate.core import validate
from foveate.tasks.base.task import Example, Task
from foveate.tasks.parts.corpus import text

_SHOWN = 400  # characters of the worked example's list
_ASKED = "\nThe most common words of the list are"


@dataclass(frozen=True)
class Counting(Task):
    """A list of words of the manual in which `common` words stand ten times as often as the others.

    A worked example with a short list stands before it, as in RULER. The score is the share of the common words in the
    answer. A model has to look everywhere: no single place holds the answer.

    Args:
        length: characters of the whole prompt. At least 1024.
        count: how many examples.
        common: words to find.
        seed: of words and their order.
    """

    length: int = 4096
    count: int = 50
    common: int = 3
    seed: int = 0
    name = "common_words"
    metric: ClassVar[str] = "contains-all"

    def __post_init__(self) -> None:
        validate.at_least("length", self.length, 1024)
        validate.at_least("count", self.count, 1)
        validate.between("common", self.common, 1, 10)

    def examples(self) -> list[Example]:
        draw = random.Random(self.seed)
        return [self._example(draw) for _ in range(self.count)]

    def _example(self, draw: random.Random) -> Example:
        words = list(_words())
        draw.shuffle(words)
        shown, asked = words[: self.common], words[self.common : 2 * self.common]
        rare = words[2 * self.common :]
        before = f"List: {_list(draw, shown, rare[:50], _SHOWN)}{_ASKED}{_answer(shown)}\n\nList: "
        body = _list(draw, asked, rare, self.length - len(before) - len(_ASKED))
        return Example(before + body + _ASKED, _answer(asked), {}, tuple(asked))


def _list(draw: random.Random, common: list[str], rare: list[str], room: int) -> str:
    """About `room` characters: every common word stands for a tenth of them, no other word more than twice."""
    times = max(3, room // 10 // (len(common[0]) + 1))
    chosen = common * times
    left = room - sum(len(word) + 1 for word in chosen)
    for word in [*rare, *rare]:
        if left < len(word) + 1:
            break
        chosen.append(word)
        left -= len(word) + 1
    draw.shuffle(chosen)
    return " ".join(chosen) + "."


def _answer(words: list[str]) -> str:
    return f" {', '.join(words)}"


@cache
def _words() -> tuple[str, ...]:
    """Words of five to eight letters that the manual uses, in alphabetical order."""
    found = Counter(re.findall(r"(?<![\w.])[a-z]{5,8}(?![\w.(])", text("heldout")))
    return tuple(sorted(word for word, times in found.items() if times > 1))
