"""The seam of tasks: examples from a seed, and a score for what a model answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One prompt and what a model should continue it with.

    `spans` names stretches of `prompt` by character offsets `[start, end)`, for instance where the needle lies.
    """

    prompt: str
    answer: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


class Task(ABC):
    """A generator of examples and the rule that scores an answer."""

    name: str

    @abstractmethod
    def examples(self) -> list[Example]:
        """The examples, the same for the same seed."""

    def score(self, example: Example, output: str) -> float:
        """1.0 where `output` begins with the expected answer (blanks at either end aside), else 0.0."""
        return float(output.strip().startswith(example.answer.strip()))
