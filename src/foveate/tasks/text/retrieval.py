"""Several needles in real text: many names, many keys of one name, or many names asked for at once.

The kinds are those of RULER (arXiv 2404.06654), whose haystacks are essays; here they are pages of the Python manual,
so that nothing has to be downloaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.parts.haystack import NAMES, hidden_in_order, listed


@dataclass(frozen=True)
class Retrieval(Task):
    """Facts ` A pass key of NAME is DIGITS.` in `length` characters of real text, and a question about some names.

    Where several keys are asked for, a worked example stands before the text, so that a model without instruction
    tuning knows what a list looks like. The score is the share of the keys asked for that the answer holds.

    Args:
        length: characters of the whole prompt. At least 512.
        count: how many examples.
        keys: names that have pass keys.
        values: pass keys of each name.
        asked: names that the question is about.
        digits: of each pass key.
        seed: of names, digits, depths and text.
    """

    length: int = 4096
    count: int = 50
    keys: int = 1
    values: int = 1
    asked: int = 1
    digits: int = 5
    seed: int = 0
    metric: ClassVar[str] = "contains-all"

    def __post_init__(self) -> None:
        for option, least in (("length", 512), ("count", 1), ("values", 1), ("digits", 1)):
            validate.at_least(option, getattr(self, option), least)
        validate.between("keys", self.keys, 1, len(NAMES) // 2)
        validate.between("asked", self.asked, 1, self.keys)
        longest = [max(NAMES, key=len)]
        fact = len(_fact(longest[0], "0" * self.digits))
        beside = self.keys * self.values * fact + len(self._question(longest * self.asked))
        shown = self.asked * self.values * (2 * fact) + 64 if self._several else 0
        if self.length - beside - shown < 128:
            raise OptionError(f"length={self.length} leaves no room for text beside {self.keys * self.values} facts")

    @property
    def name(self) -> str:  # type: ignore[override]
        if self.asked > 1:
            return "niah_multiquery"
        if self.values > 1:
            return "niah_multivalue"
        return "niah_multikey" if self.keys > 1 else "niah_single"

    def examples(self) -> list[Example]:
        draw = random.Random(self.seed)
        return [self._example(draw) for _ in range(self.count)]

    def _question(self, asked: list[str]) -> str:
        return f"\nThe pass key{'s' * self._several} of {listed(asked)} {'are' if self._several else 'is'}"

    @property
    def _several(self) -> bool:
        return self.asked * self.values > 1

    def _shown(self, draw: random.Random, names: list[str]) -> str:
        """Facts about names that the text has nothing of, with their question and its answer."""
        if not self._several:
            return ""
        secrets = ["".join(draw.choices("0123456789", k=self.digits)) for _ in range(len(names) * self.values)]
        owners = [name for name in names for _ in range(self.values)]
        facts = "".join(map(_fact, owners, secrets))
        return f"{facts.lstrip()}{self._question(names)} {listed(secrets)}.\n\n"

    def _example(self, draw: random.Random) -> Example:
        names = draw.sample(NAMES, self.keys + (self.asked if self._several else 0))
        before, names = self._shown(draw, names[self.keys :]), names[: self.keys]
        order = [name for name in names for _ in range(self.values)]
        draw.shuffle(order)
        secrets = ["".join(draw.choices("0123456789", k=self.digits)) for _ in order]
        facts = [_fact(name, digits) for name, digits in zip(order, secrets, strict=True)]
        asked = draw.sample(names, self.asked)
        room = self.length - len(before) - sum(map(len, facts)) - len(self._question(asked))
        body, spans = hidden_in_order(draw, facts, room)
        wanted = [i for name in asked for i, owner in enumerate(order) if owner == name]
        answers = tuple(secrets[i] for i in wanted)
        named = {f"needle {n}": (spans[i][0] + len(before), spans[i][1] + len(before)) for n, i in enumerate(wanted)}
        return Example(before + body + self._question(asked), f" {listed(answers)}", named, answers)


def _fact(name: str, digits: str) -> str:
    return f" A pass key of {name} is {digits}."
