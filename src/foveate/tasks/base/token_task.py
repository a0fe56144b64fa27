"""The base class of tasks whose prompts have a length in the tokens of the model at hand."""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Self

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.tokens import CHARACTERS, Tokens, largest


@dataclass(frozen=True)
class TokenTask(Task):
    """Examples that fill `length` tokens, the answer's tokens included.

    Args:
        length: tokens of a prompt and of the answer that the model may give.
        count: how many examples.
        seed: the seed of the examples.
        tokens: the tokens that `length` counts; by default each character is one, as the lab model reads them.
    """

    length: int = 4096
    count: int = 20
    seed: int = 0
    tokens: Tokens = field(default=CHARACTERS, compare=False, repr=False)

    def __post_init__(self) -> None:
        validate.count("length", self.length, 256)
        validate.count("count", self.count, 1)

    def sized(self, tokens: Tokens) -> Self:
        return replace(self, tokens=tokens)

    def examples(self) -> list[Example]:
        draw = random.Random(f"{self.name} {self.seed}")
        found: list[Example] = []
        while len(found) < self.count:
            found += self._fitted(draw.getrandbits(64))
        return found[: self.count]

    @abstractmethod
    def _built(self, draw: random.Random, size: int) -> list[Example]:
        """Build examples with one context of `size` pieces of text; most tasks ask one question about a context.

        The same draw and a larger size give longer prompts.
        """

    def _fitted(self, seed: int) -> list[Example]:
        """Return the examples of the largest size whose prompts and answers fill at most `length` tokens."""

        def fits(size: int) -> bool:
            built = self._built(random.Random(seed), size)
            return max(self.tokens.count(one.prompt) + one.new_tokens for one in built) <= self.length

        size = largest(fits, self.length, self.length // 64)  # each piece has a token at least
        if not size:
            raise OptionError(f"length={self.length} must be larger: {self.name} does not fit that many tokens")
        return self._built(random.Random(seed), size)


def divided(context: str, question: str, answers: tuple[str, ...], answer: str = "", **more: Any) -> Example:
    """Return an example whose question, with the beginning of an answer, follows its context.

    Args:
        context, question: the two parts of the prompt.
        answers: the accepted answers.
        answer: the expected continuation; empty joins all accepted answers.
        more: other arguments of `Example`.
    """
    spans = {"context": (0, len(context)), "question": (len(context), len(context) + len(question))}
    return Example(context + question, answer or f" {', '.join(answers)}", spans, answers, **more)
