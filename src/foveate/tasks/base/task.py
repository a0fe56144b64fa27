"""The base class of tasks: examples from a seed, and a score for a model's answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Self

from foveate.tasks.base.scores import SCORES
from foveate.tasks.base.tokens import Tokens
from foveate.tasks.rules.registry import RULES


@dataclass(frozen=True)
class Example:
    """One prompt and its expected continuation.

    Args:
        prompt: the text that the model reads.
        answer: the expected continuation.
        spans: stretches of `prompt` by character offsets `[start, end)`, such as that of the needle. A span
            "question" divides the prompt: what comes before it is the context, which a method can compress without
            knowing the question. Examples with equal contexts share it.
        accepted: every accepted answer, `answer` included; empty where it is the only one.
        messages: a conversation as `{"role": ..., "content": ...}`, which the model's chat template formats;
            `prompt` then holds the same conversation as plain text.
        rule: the benchmark's own scoring rule, a name in `foveate.tasks.rules.registry.RULES`; empty for the task's
            metric.
        facts: what the rule needs to know beside the answers, as plain data.
        new_tokens: how many tokens the benchmark lets a model generate; 0 leaves it to the answers.
        stop: the output ends before the first of these texts.
    """

    prompt: str
    answer: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    rule: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    stop: tuple[str, ...] = ()

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
        """The default score, one of `foveate.tasks.base.scores.SCORES` or `LOSS`, or the name of the examples' rule."""
        return "begins"

    def sized(self, tokens: Tokens) -> Self:
        """Return the task for a model's tokens; a task whose length is in characters stays as it is."""
        return self

    @abstractmethod
    def examples(self) -> list[Example]:
        """Return the examples; the same seed gives the same ones."""

    def score(self, example: Example, output: str) -> float:
        """Score `output` in 0..1 by the example's own rule, or else by the task's."""
        if example.rule:
            return RULES[example.rule](output, example.answers, example.facts)
        return SCORES[self.metric](output, example.answers)
