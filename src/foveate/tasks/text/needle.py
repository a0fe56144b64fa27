"""Needle in a haystack: a fact hidden in real text, which the model has to repeat.

Facts read ` The pass key of NAME is DIGITS.`; the haystack is the Python manual. The prompt ends in the same words
about one of the names, up to ` is`, and the answer is its digits. The other facts are distractors of the same form, so
that a model has to look for the name and cannot simply copy the only digits in the text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.parts.haystack import NAMES, hidden, snap


def fact(name: str, digits: str) -> str:
    return f" The pass key of {name} is {digits}."


def question(name: str) -> str:
    return f"\nThe pass key of {name} is"


@dataclass(frozen=True)
class Needle(Task):
    """Retrieve one of several facts from `length` characters of real text.

    Args:
        length: characters of the whole prompt; the lab model reads one character as one token. At least 256.
        count: how many examples.
        distractors: facts about other names.
        digits: length of the answer, without its leading blank.
        seed: the seed of names, digits, depths and text.

    The depth of the needle is uniform over the text; `spans["needle"]` holds its place.
    """

    length: int = 1024
    count: int = 50
    distractors: int = 3
    digits: int = 5
    seed: int = 0
    name = "needle"

    def __post_init__(self) -> None:
        for option, least in (("length", 256), ("count", 1), ("distractors", 0), ("digits", 1)):
            if getattr(self, option) < least:
                raise OptionError(f"{option}={getattr(self, option)} must be at least {least}")
        if self.distractors >= len(NAMES):
            raise OptionError(f"distractors={self.distractors} must be under {len(NAMES)}, the number of names")
        if self._filler_length() < 64:
            raise OptionError(
                f"length={self.length} must be larger: {self.distractors + 1} facts leave no room for text"
            )

    def examples(self) -> list[Example]:
        draw = random.Random(self.seed)
        return [self._example(draw) for _ in range(self.count)]

    def _filler_length(self) -> int:
        longest = max(NAMES, key=len)
        facts = (self.distractors + 1) * len(fact(longest, "0" * self.digits))
        return self.length - facts - len(question(longest))

    def _example(self, draw: random.Random) -> Example:
        names = draw.sample(NAMES, self.distractors + 1)
        facts = [fact(name, "".join(draw.choices("0123456789", k=self.digits))) for name in names]
        room = self.length - sum(map(len, facts)) - len(question(names[0]))
        body, spans = hidden(draw, facts, room)
        named = {"needle" if index == 0 else f"distractor {index}": span for index, span in enumerate(spans)}
        prompt = body + question(names[0])
        return Example(prompt, facts[0].removesuffix(".").removeprefix(question(names[0]).replace("\n", " ")), named)


__all__ = ["NAMES", "Needle", "fact", "question", "snap"]
