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
from foveate.tasks.base import Example, Task
from foveate.tasks.haystack import NAMES, hidden_in_order, listed


@dataclass(frozen=True)
class Retrieval(Task):
    """Facts ` A pass key of NAME is DIGITS.` in `length` characters of real text, and a question about some names.

    The score is the share of the keys asked for that the answer holds.

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
        validate.between("keys", self.keys, 1, len(NAMES))
        validate.between("asked", self.asked, 1, self.keys)
        longest = [max(NAMES, key=len)]
        facts = self.keys * self.values * len(_fact(longest[0], "0" * self.digits))
        if self.length - facts - len(self._question(longest * self.asked)) < 128:
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
        several = self.asked * self.values > 1
        return f"\nThe pass key{'s' * several} of {listed(asked)} {'are' if several else 'is'}"

    def _example(self, draw: random.Random) -> Example:
        names = draw.sample(NAMES, self.keys)
        order = [name for name in names for _ in range(self.values)]
        draw.shuffle(order)
        secrets = ["".join(draw.choices("0123456789", k=self.digits)) for _ in order]
        facts = [_fact(name, digits) for name, digits in zip(order, secrets, strict=True)]
        asked = draw.sample(names, self.asked)
        room = self.length - sum(map(len, facts)) - len(self._question(asked))
        body, spans = hidden_in_order(draw, facts, room)
        wanted = [i for name in asked for i, owner in enumerate(order) if owner == name]
        answers = tuple(secrets[i] for i in wanted)
        named = {f"needle {n}": spans[i] for n, i in enumerate(wanted)}
        return Example(body + self._question(asked), f" {listed(answers)}", named, answers)


def _fact(name: str, digits: str) -> str:
    return f" A pass key of {name} is {digits}."
