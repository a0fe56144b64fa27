"""A drill as a task: a model is asked for the first label of each sequence, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.core import validate
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.training_task import IGNORED, Drill


@dataclass(frozen=True)
class Recited(Task):
    """Held-out sequences of a drill up to the last position that asks for something; the answer is its label.

    Args:
        drill: of tokens, such as `MQAR()`.
        count: how many examples.
        seed: of the sequences.
    """

    drill: Drill
    count: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        validate.count("count", self.count, 1)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.drill.name

    @property
    def length(self) -> int:
        return self.drill.length

    def examples(self) -> list[Example]:
        tokens, labels = self.drill.heldout(self.count, 2**31 + self.seed)
        found = []
        for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
            at = max(i for i, label in enumerate(asked) if label != IGNORED)
            found.append(Example(" ".join(map(str, row[: at + 1])), str(asked[at])))
        return found

    def score(self, example: Example, output: str) -> float:
        """1.0 where the first number said is the answer: 12 is not the beginning of 123."""
        return float(output.split()[:1] == [example.answer])
