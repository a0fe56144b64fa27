"""Common words: find the most frequent words of a long list. A task of RULER (arXiv 2404.06654)."""

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

_EXAMPLE_LENGTH = 400  # characters of the list in the worked example
_QUESTION = "\nThe most common words of the list are"


@dataclass(frozen=True)
class Counting(Task):
    """A list of words from the manual in which `common` words occur ten times as often as the others.

    As in RULER, a worked example with a short list comes first. The score is the share of the common words that the
    answer contains. The model has to read the whole list: no single place holds the answer.

    Args:
        length: characters of the whole prompt. At least 1024.
        count: how many examples.
        common: words to find.
        seed: the seed of the words and their order.
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
        shown, common = words[: self.common], words[self.common : 2 * self.common]
        rare = words[2 * self.common :]
        before = f"List: {_list(draw, shown, rare[:50], _EXAMPLE_LENGTH)}{_QUESTION}{_answer(shown)}\n\nList: "
        body = _list(draw, common, rare, self.length - len(before) - len(_QUESTION))
        return Example(before + body + _QUESTION, _answer(common), {}, tuple(common))


def _list(draw: random.Random, common: list[str], rare: list[str], room: int) -> str:
    """Return about `room` characters: each common word takes a tenth of them, other words occur at most twice."""
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
    """Return the manual's words of five to eight letters, in alphabetical order."""
    found = Counter(re.findall(r"(?<![\w.])[a-z]{5,8}(?![\w.(])", text("heldout")))
    return tuple(sorted(word for word, times in found.items() if times > 1))
