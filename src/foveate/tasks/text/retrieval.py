"""Several needles in real text: many keys, several values of one key, or several queries at once.

The tasks are those of RULER (arXiv 2404.06654). Its haystacks are essays; here they are pages of the Python manual, so
that nothing has to be downloaded.
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

    If the answer is a list, a worked example comes first, so that a model without instruction tuning knows the form of
    the answer. The score is the share of the requested pass keys that the answer contains.

    Args:
        length: characters of the whole prompt. At least 512.
        count: how many examples.
        keys: names that have pass keys.
        values: pass keys of each name.
        queries: names in the question.
        digits: length of each pass key.
        seed: the seed of names, digits, depths and text.
    """

    length: int = 4096
    count: int = 50
    keys: int = 1
    values: int = 1
    queries: int = 1
    digits: int = 5
    seed: int = 0
    metric: ClassVar[str] = "contains-all"

    def __post_init__(self) -> None:
        for option, least in (("length", 512), ("count", 1), ("values", 1), ("digits", 1)):
            validate.at_least(option, getattr(self, option), least)
        validate.between("keys", self.keys, 1, len(NAMES) // 2)
        validate.between("queries", self.queries, 1, self.keys)
        longest = [max(NAMES, key=len)]
        fact = len(_fact(longest[0], "0" * self.digits))
        facts = self.keys * self.values * fact + len(self._question(longest * self.queries))
        shown = self.queries * self.values * (2 * fact) + 64 if self._several else 0
        if self.length - facts - shown < 128:
            raise OptionError(
                f"length={self.length} must be larger: {self.keys * self.values} facts leave no room for text"
            )

    @property
    def name(self) -> str:
        if self.queries > 1:
            return "niah_multiquery"
        if self.values > 1:
            return "niah_multivalue"
        return "niah_multikey" if self.keys > 1 else "niah_single"

    def examples(self) -> list[Example]:
        draw = random.Random(self.seed)
        return [self._example(draw) for _ in range(self.count)]

    def _question(self, names: list[str]) -> str:
        return f"\nThe pass key{'s' * self._several} of {listed(names)} {'are' if self._several else 'is'}"

    @property
    def _several(self) -> bool:
        return self.queries * self.values > 1

    def _worked_example(self, draw: random.Random, names: list[str]) -> str:
        """Return the worked example: facts about names that are not in the text, a question and its answer."""
        if not self._several:
            return ""
        secrets = ["".join(draw.choices("0123456789", k=self.digits)) for _ in range(len(names) * self.values)]
        owners = [name for name in names for _ in range(self.values)]
        facts = "".join(map(_fact, owners, secrets))
        return f"{facts.lstrip()}{self._question(names)} {listed(secrets)}.\n\n"

    def _example(self, draw: random.Random) -> Example:
        names = draw.sample(NAMES, self.keys + (self.queries if self._several else 0))
        before, names = self._worked_example(draw, names[self.keys :]), names[: self.keys]
        order = [name for name in names for _ in range(self.values)]
        draw.shuffle(order)
        secrets = ["".join(draw.choices("0123456789", k=self.digits)) for _ in order]
        facts = [_fact(name, digits) for name, digits in zip(order, secrets, strict=True)]
        queried = draw.sample(names, self.queries)
        room = self.length - len(before) - sum(map(len, facts)) - len(self._question(queried))
        body, spans = hidden_in_order(draw, facts, room)
        wanted = [i for name in queried for i, owner in enumerate(order) if owner == name]
        answers = tuple(secrets[i] for i in wanted)
        named = {f"needle {n}": (spans[i][0] + len(before), spans[i][1] + len(before)) for n, i in enumerate(wanted)}
        return Example(before + body + self._question(queried), f" {listed(answers)}", named, answers)


def _fact(name: str, digits: str) -> str:
    return f" A pass key of {name} is {digits}."
