"""RULER's variable tracking, `vt` (arXiv 2404.06654): one chain of five variables in repeated noise."""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass
from typing import ClassVar

from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask
from foveate.tasks.base.tokens import largest
from foveate.tasks.thirteen.needles import NOISE

_HOPS, _NEW_TOKENS, _SHOWN_TOKENS = 4, 30, 500


@dataclass(frozen=True)
class Variables(TokenTask):
    """The names of all variables that a value reaches over `VAR A = 12345`, `VAR B = VAR A` and so on.

    As in RULER, a worked example of at most 500 tokens comes first, names have five letters (three in the example), and
    the score is the share of the five names that the output contains. The noise and the wording are ours, so that it is
    not a RULER score.
    """

    name = "ruler/vt"
    metric: ClassVar[str] = "ruler-all"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        shown = self._shown(draw)
        names, value = _names(draw, 5), str(draw.randint(10000, 99999))
        body, question = _body(draw, names, value, size), _question(value)
        context = f"{shown}\n{body}"
        prompt = context + question
        spans = {"context": (0, len(context)), "question": (len(context), len(prompt))}
        for number, line in enumerate(_assignments(names, value)):
            at = prompt.rfind(line)
            spans[f"needle {number}"] = (at, at + len(line))
        answer = f" {' '.join(names)}"
        return [Example(prompt, answer, spans, tuple(names), rule=self.metric, new_tokens=_NEW_TOKENS)]

    def _shown(self, draw: random.Random) -> str:
        """Return the worked example, which takes at most 500 tokens and a third of the length."""
        seed, room = draw.getrandbits(64), min(_SHOWN_TOKENS, self.length // 3)

        def built(size: int) -> str:
            own = random.Random(seed)
            names, value = _names(own, 3), str(own.randint(10000, 99999))
            return f"{_body(own, names, value, size)}{_question(value)} {' '.join(names)}"

        return built(max(1, largest(lambda size: self.tokens.count(built(size)) <= room, room)))


def _names(draw: random.Random, letters: int) -> list[str]:
    found: list[str] = []
    while len(found) <= _HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        found += [name] if name not in (*found, "VAR") else []
    return found


def _assignments(names: list[str], value: str) -> list[str]:
    return [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)),
    ]


def _body(draw: random.Random, names: list[str], value: str, size: int) -> str:
    lines, assignments = [NOISE] * size, _assignments(names, value)
    places = sorted(draw.randrange(size + 1) for _ in assignments)
    for place, line in sorted(zip(places, range(len(assignments)), strict=True), reverse=True):
        lines.insert(place, assignments[line])
    return "Keep track of the variables in this text.\n\n" + "\n".join(lines)


def _question(value: str) -> str:
    return (
        f"\nQuestion: Which variables hold the value {value}, directly or through others?"
        f" Answer: {_HOPS + 1} variables hold the value {value}:"
    )
