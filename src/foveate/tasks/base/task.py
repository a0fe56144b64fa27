"""The seam of tasks: examples from a seed, and a score for what a model answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from foveate.tasks.base.scores import SCORES


@dataclass(frozen=True)
class Example:
    """One prompt and what a model should continue it with.

    Args:
        prompt: the text that a model reads.
        answer: the expected continuation.
        spans: stretches of `prompt` by character offsets `[start, end)`, for instance where the needle lies.
        answers: every accepted answer; `(answer,)` where none are given.
        messages: a conversation as `{"role": ..., "content": ...}`, for the model's chat template to put into words;
            `prompt` is then the same conversation in plain words.
    """

    prompt: str
    answer: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers) or (self.answer,))


class Task(ABC):
    """A generator of examples and the rule that scores an answer.

    Attributes:
        metric: which of `foveate.tasks.base.scores` it is scored by, unless somebody asks for another.
    """

    name: str
    metric: ClassVar[str] = "begins"

    @abstractmethod
    def examples(self) -> list[Example]:
        """The examples, the same for the same seed."""

    def score(self, example: Example, output: str) -> float:
        """How good `output` is as an answer, in 0..1, by the task's own rule."""
        return SCORES[self.metric](output, example.answers)
