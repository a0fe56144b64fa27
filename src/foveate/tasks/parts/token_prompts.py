"""Prompts from a training task: token numbers as words, with the last label as the answer."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.core import validate
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.training_task import IGNORED, TrainingTask


@dataclass(frozen=True)
class TokenPrompts(Task):
    """Held-out sequences of a training task, each cut at its last label; the answer is that label.

    Args:
        training_task: a task of tokens, such as `MQAR()`.
        count: how many examples.
        seed: the seed of the sequences.
    """

    training_task: TrainingTask
    count: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        validate.count("count", self.count, 1)

    @property
    def name(self) -> str:
        return self.training_task.name

    @property
    def length(self) -> int:
        return self.training_task.length

    def examples(self) -> list[Example]:
        tokens, labels = self.training_task.heldout(self.count, 2**31 + self.seed)
        found = []
        for row, targets in zip(tokens.tolist(), labels.tolist(), strict=True):
            at = max(i for i, label in enumerate(targets) if label != IGNORED)
            found.append(Example(" ".join(map(str, row[: at + 1])), str(targets[at])))
        return found

    def score(self, example: Example, output: str) -> float:
        """Return 1.0 if the first word of the output is the answer; a longer number is not."""
        return float(output.split()[:1] == [example.answer])
