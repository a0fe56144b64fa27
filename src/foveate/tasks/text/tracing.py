"""Variable tracking: follow a value through a chain of assignments. A task of RULER (arXiv 2404.06654)."""

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
    """A chain `VAR A = 12345`, `VAR B = VAR A`, … hidden in text; the question is which variables hold the value.

    As in RULER, a worked example comes first. The score is the share of the chain's names that the answer contains.

    Args:
        length: characters of the whole prompt. At least 1024.
        count: how many examples.
        hops: assignments after the first, each to a new variable.
        seed: the seed of names, values, depths and text.
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
        shown, chain = self._chain(draw), self._chain(draw)
        while set(shown[0]) & set(chain[0]):
            chain = self._chain(draw)
        before = "".join(_assignments(*shown)).lstrip() + _question(shown[1]) + _answer(shown[0]) + "\n\n"
        assignments, question = _assignments(*chain), _question(chain[1])
        room = self.length - len(before) - len(question) - sum(map(len, assignments))
        body, spans = hidden_in_order(draw, assignments, room)
        moved = {f"needle {i}": (a + len(before), b + len(before)) for i, (a, b) in enumerate(spans)}
        return Example(before + body + question, _answer(chain[0]), moved, tuple(chain[0]))

    def _chain(self, draw: random.Random) -> tuple[list[str], str]:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(draw.choices(string.ascii_uppercase, k=3))
            names += [name] if name not in (*names, "VAR") else []
        return names, "".join(draw.choices(string.digits, k=5))


def _assignments(names: list[str], value: str) -> list[str]:
    later = [f" VAR {new} = VAR {old}." for old, new in pairwise(names)]
    return [f" VAR {names[0]} = {value}.", *later]


def _question(value: str) -> str:
    return f"\nThe variables that hold the value {value} are"


def _answer(names: list[str]) -> str:
    return f" {', '.join(names)}"
