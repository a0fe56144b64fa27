"""Six tasks modelled on RULER, on real text and small enough for small models.

RULER: What's the Real Context Size of Your Long-Context Language Models? (2024), arXiv 2404.06654.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import validate
from foveate.tasks.base.task import Example, Task
from foveate.tasks.text.counting import Counting
from foveate.tasks.text.retrieval import Retrieval
from foveate.tasks.text.tracing import Tracing

KINDS = (
    "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking", "common_words",
)  # fmt: skip


def kind(name: str, length: int = 4096, count: int = 8, seed: int = 0) -> Task:
    """Create one of the six tasks by its name."""
    validate.one_of("task", name, KINDS)
    if name == "variable_tracking":
        return Tracing(length, count, seed=seed)
    if name == "common_words":
        return Counting(length, count, seed=seed)
    keys, values, queries = {
        "niah_single": (1, 1, 1), "niah_multikey": (8, 1, 1),
        "niah_multivalue": (2, 3, 1), "niah_multiquery": (6, 1, 3),
    }[name]  # fmt: skip
    return Retrieval(length, count, keys, values, queries, seed=seed)


@dataclass(frozen=True)
class Ruler(Task):
    """Examples of the six tasks in turn: four needle tasks, variable tracking and common words.

    Args:
        length: characters of each prompt.
        count: how many examples in all.
        seed: the seed of each task.
    """

    length: int = 4096
    count: int = 48
    seed: int = 0
    name = "ruler"
    metric: ClassVar[str] = "contains-all"

    def __post_init__(self) -> None:
        validate.at_least("count", self.count, 1)

    def examples(self) -> list[Example]:
        rounds = -(-self.count // len(KINDS))
        tasks = [kind(name, self.length, rounds, self.seed).examples() for name in KINDS]
        return [each[turn] for turn in range(rounds) for each in tasks][: self.count]
