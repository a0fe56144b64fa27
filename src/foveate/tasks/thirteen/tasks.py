"""RULER's thirteen tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from foveate.core import validate
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.token_task import TokenTask
from foveate.tasks.base.tokens import CHARACTERS, Tokens
from foveate.tasks.rules.registry import SEVERAL
from foveate.tasks.thirteen import needles
from foveate.tasks.thirteen.documents import Documents
from foveate.tasks.thirteen.variables import Variables
from foveate.tasks.thirteen.words import CommonWords, FrequentWords

NAMES = (*needles.KINDS, "vt", "cwe", "fwe", "qa_1", "qa_2")


def task(name: str, **options: Any) -> TokenTask:
    """Create one of the thirteen tasks by RULER's name for it."""
    validate.one_of("task", name, NAMES)
    if name in needles.KINDS:
        return needles.Needles(kind=name, **options)
    if name.startswith("qa"):
        return Documents(hops=int(name[-1]), **options)
    kinds: dict[str, Callable[..., TokenTask]] = {"vt": Variables, "cwe": CommonWords, "fwe": FrequentWords}
    return kinds[name](**options)


@dataclass(frozen=True)
class Thirteen(Task):
    """Examples of the thirteen tasks in turn; the score is their mean.

    Tasks and rules are RULER's, but texts and wording are ours: the mean is not a RULER score.

    Args:
        length: tokens of a prompt and its answer.
        count: how many examples in all; a multiple of 13 weighs all tasks alike.
        seed: the seed of each task.
        tokens: the tokens that `length` counts.
    """

    length: int = 4096
    count: int = 26
    seed: int = 0
    tokens: Tokens = field(default=CHARACTERS, compare=False, repr=False)
    name = "ruler/all"
    metric: ClassVar[str] = SEVERAL

    def __post_init__(self) -> None:
        validate.count("count", self.count, 1)

    def sized(self, tokens: Tokens) -> Self:
        return replace(self, tokens=tokens)

    def examples(self) -> list[Example]:
        rounds = -(-self.count // len(NAMES))
        each = [
            task(name, length=self.length, count=rounds, seed=self.seed, tokens=self.tokens).examples()
            for name in NAMES
        ]
        return [found[turn] for turn in range(rounds) for found in each][: self.count]
