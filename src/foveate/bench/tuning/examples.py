"""The examples of a search, and those that are held out: none is in both."""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.files.prompts import Prompts
from foveate.tasks.files.records import is_file
from foveate.tasks.registry import TASKS

#: The fewest examples of each kind.
LEAST = 8


@dataclass(frozen=True)
class Drawn(Task):
    """Some examples of a task, with its name and its score."""

    task: Task
    some: tuple[Example, ...]

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def metric(self) -> str:
        return self.task.metric

    def examples(self) -> list[Example]:
        return list(self.some)

    def score(self, example: Example, output: str) -> float:
        return self.task.score(example, output)


def is_prompt_file(task: str | None) -> bool:
    """Return whether a task is a file of prompts, whose examples are all read and then split."""
    return task is not None and task not in (*TASKS, "mqar", "copy", "lm") and is_file(task)


def split(task: Task, search: int, held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return examples to search with and held-out ones.

    The examples of a file are shuffled first, since neighbours may be alike; a file with too few of them gives a
    quarter to the search. Prompts that occur again are left out.
    """
    found = list({_identity(example): example for example in task.examples()}.values())
    if isinstance(task, Prompts):
        random.Random(seed).shuffle(found)
    if len(found) < search + held_out:
        search = min(search, max(LEAST, len(found) // 4))
    first, rest = found[:search], found[search : search + held_out]
    if len(first) < LEAST or len(rest) < LEAST:
        raise TaskError(
            f"{task.name} holds {len(found)} different examples; at least {2 * LEAST} are needed, {LEAST} to search "
            f"with and {LEAST} held-out ones"
        )
    return first, rest


def _identity(example: Example) -> tuple[str, str]:
    return example.prompt, repr(example.messages)
