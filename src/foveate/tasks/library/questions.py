"""Question answering over the standard library's documentation, with one or several questions on one context."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from foveate.core import validate
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask, divided
from foveate.tasks.parts.library import Function, functions

_NEW_TOKENS = 40
_ORDINALS = ("first", "second", "third")
_INTRO = "Documentation of some functions of Python:\n\n"


@dataclass(frozen=True)
class LibraryQuestions(TokenTask):
    """Questions about functions whose documentation is in the context: which one, what it does, and its parameters.

    The score is the F1 of SQuAD's words, over the first line of the output. The model may know the library from its
    training: compare with the full cache, not across models. With several questions, a method that reads the context
    once has to keep what all of them need.

    Args:
        length, count, seed, tokens: see `TokenTask`; `count` counts questions.
        questions: how many questions share a context.
    """

    questions: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.between("questions", self.questions, 1, 20)

    @property
    def name(self) -> str:
        return "docs_qa" if self.questions == 1 else "docs_questions"

    @property
    def metric(self) -> str:
        return "longbench-qa"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        known = _known()
        chosen = draw.sample(known, self.questions + min(size, len(known) - self.questions))
        asked, first = chosen[: self.questions], draw.randrange(3)
        draw.shuffle(chosen)
        context = _INTRO + "\n\n".join(function.document for function in chosen)
        return [self._asked(context, function, (first + number) % 3) for number, function in enumerate(asked)]

    def _asked(self, context: str, function: Function, kind: int) -> Example:
        question, answers = _question(function, kind)
        return divided(
            context, f"\n\nQuestion: {question}\nAnswer:", answers, f" {answers[0]}", rule=self.metric,
            new_tokens=_NEW_TOKENS, stop=("\n",),
        )  # fmt: skip


@cache
def _known() -> tuple[Function, ...]:
    return tuple(f for f in functions() if f.parameters and len(f.document) < 700 and _is_clear(f))


def _is_clear(function: Function) -> bool:
    """Return True if no parameter that a question may ask for is a single letter or an article."""
    return all(len(name) > 2 and name != "the" for name in function.parameters[: len(_ORDINALS)])


def _question(function: Function, kind: int) -> tuple[str, tuple[str, ...]]:
    """Return a question and its accepted answers; a function may be named without its module."""
    if kind == 0:
        names = (function.name, function.name.rsplit(".", 1)[1])
        return f'Which function is described as "{function.summary}"?', names
    if kind == 1:
        return f"What is the description of {function.name}?", (function.summary,)
    place = min(len(function.parameters), len(_ORDINALS)) - 1
    return f"What is the {_ORDINALS[place]} parameter of {function.name}?", (function.parameters[place],)
