"""Passage ranking: the order in which numbered passages of documentation fit a description."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask, divided
from foveate.tasks.parts.library import Function, functions

_NEW_TOKENS = 48
_SHORTEST, _LONGEST, _RELATED = 80, 600, 3
_INTRO = (
    "Each list below has passages with numbers. Rank them by how well they fit the query, the best first.\n\n"
    "[1] Close the socket.\n[2] Return the length of the list.\n[3] Count the items of a list that equal x.\n"
    "Query: how many items a list has\nRanking: 2 > 3 > 1\n\n"
)


@dataclass(frozen=True)
class Ranking(TokenTask):
    """The passages are the later paragraphs of functions' documentation; the query is the first line of one of them.

    Its own passage has grade 2, three passages of the same module have grade 1, and the others 0. The score is NDCG@10,
    as for passages in HELMET (arXiv 2410.02694). A random order of 19 passages scores 0.34 on average, and less with
    more of them: the full cache's score is needed beside it.
    """

    name = "ranking"
    metric: ClassVar[str] = "ndcg"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        known, times = _known()
        asked = draw.choice([f for f in known if times[f.module] > _RELATED])
        related = draw.sample([f for f in known if f.module == asked.module and f is not asked], _RELATED)
        others = [f for f in known if f.module != asked.module]
        passages = [asked, *related, *draw.sample(others, min(size, len(others)))]
        numbers = draw.sample(range(10, 10 + max(90, 2 * len(passages))), len(passages))
        grades = dict(zip(map(str, numbers), [2] + [1] * _RELATED + [0] * (len(passages) - 1 - _RELATED), strict=True))
        order = list(zip(numbers, passages, strict=True))
        best = ", ".join(str(number) for number in numbers[: 1 + _RELATED])
        draw.shuffle(order)
        context = _INTRO + "\n".join(_passage(number, function) for number, function in order)
        question = f"\nQuery: {asked.summary.rstrip('.')} ({asked.module})\nRanking:"
        return [
            divided(
                context, question, (best,), rule=self.metric, facts={"grades": grades}, new_tokens=_NEW_TOKENS,
                stop=("\n",),
            )
        ]  # fmt: skip


@cache
def _known() -> tuple[tuple[Function, ...], Counter[str]]:
    """Return the functions with a passage of fitting length, and how many of them each module has."""
    found = tuple(f for f in functions() if _SHORTEST <= len(f.body) <= _LONGEST)
    return found, Counter(f.module for f in found)


def _passage(number: int, function: Function) -> str:
    return f"[{number}] {function.module}: {' '.join(function.body.split())}"
