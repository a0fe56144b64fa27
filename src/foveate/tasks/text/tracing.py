"""Variable tracking: a value that is handed from name to name, in real text. A kind of RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from foveate.core import validate
from foveate.tasks.base.task import Example, Task
from foveate.tasks.parts.haystack import hidden_in_order


@dataclass(frozen=True)
class Tracing(Task):
    """A chain `VAR A = 12345`, `VAR B = VAR A`, … hidden in text, and the question which variables hold the value.

    A worked example stands before the text, as in RULER. The score is the share of the chain's names in the answer.

    Args:
        length: characters of the whole prompt. At least 1024.
        count: how many examples.
        hops: variables of the chain beside the first.
        seed: of names, values, depths and text.
    """

    length: int = 4096
    count: int = 50
    hops: int = 2
    seed: int = 0
    name = "variable_tracking"
    metric: ClassVar[str] = "contains-all"

    def __post_init__(self) -> None:
        validate.at_least("length", self.length, 1024)
        validate.at_least("count", self.count, 1)
        validate.between("hops", self.hops, 1, 8)

    def examples(self) -> list[Example]:
        draw = random.Random(self.seed)
        return [self._example(draw) for _ in range(self.count)]

    def _example(self, draw: random.Random) -> Example:
        shown, asked = self._chain(draw), self._chain(draw)
        while set(shown[0]) & set(asked[0]):
            asked = self._chain(draw)
        before = "".join(_steps(*shown)).lstrip() + _question(shown[1]) + _answer(shown[0]) + "\n\n"
        steps, question = _steps(*asked), _question(asked[1])
        room = self.length - len(before) - len(question) - sum(map(len, steps))
        body, spans = hidden_in_order(draw, steps, room)
        moved = {f"needle {i}": (a + len(before), b + len(before)) for i, (a, b) in enumerate(spans)}
        return Example(before + body + question, _answer(asked[0]), moved, tuple(asked[0]))

    def _chain(self, draw: random.Random) -> tuple[list[str], str]:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(draw.choices(string.ascii_uppercase, k=3))
            names += [name] if name not in (*names, "VAR") else []
        return names, "".join(draw.choices(string.digits, k=5))


def _steps(names: list[str], value: str) -> list[str]:
    handed = [f" VAR {new} = VAR {old}." for old, new in pairwise(names)]
    return [f" VAR {names[0]} = {value}.", *handed]


def _question(value: str) -> str:
    return f"\nThe variables that hold the value {value} are"


def _answer(names: list[str]) -> str:
    return f" {', '.join(names)}"
