"""The base class of tasks: examples from a seed, and a score for a model's answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from foveate.tasks.base.scores import SCORES


@dataclass(frozen=True)
class Example:
    """One prompt and its expected continuation.

    Args:
        prompt: the text that the model reads.
        answer: the expected continuation.
        spans: stretches of `prompt` by character offsets `[start, end)`, such as that of the needle.
        accepted: every accepted answer, `answer` included; empty where it is the only one.
        messages: a conversation as `{"role": ..., "content": ...}`, which the model's chat template formats;
            `prompt` then holds the same conversation as plain text.
    """

    prompt: str
    answer: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Every accepted answer."""
        return self.accepted or (self.answer,)


class Task(ABC):
    """A generator of examples and the rule that scores an answer.

    A class may set `name` and `metric` as plain attributes.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The task's name in results."""

    @property
    def metric(self) -> str:
        """The default score, one of `foveate.tasks.base.scores.SCORES` or `LOSS`."""
        return "begins"

    @abstractmethod
    def examples(self) -> list[Example]:
        """Return the examples; the same seed gives the same ones."""

    def score(self, example: Example, output: str) -> float:
        """Score `output` in 0..1 by the task's own rule."""
        return SCORES[self.metric](output, example.answers)
