"""Rules of retrieval benchmarks: OpenAI's MRCR, NoLiMa, and the rank of passages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

Facts = Mapping[str, Any]


def mrcr(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return difflib's ratio to the answer, both without their prefix; 0.0 for an output that lacks the prefix.

    Args:
        output: the model's output.
        answers: the answer with its prefix.
        facts: "prefix", the random string that the output has to begin with.

    The rule is that of the data set's card. Third-party ports differ on blanks at the start of the output: they are
    removed here, as in NVIDIA's port.
    """
    prefix = str(facts["prefix"]).strip()
    text, answer = output.strip(), answers[0].strip()
    if not text.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, text.removeprefix(prefix), answer.removeprefix(prefix)).ratio()


def nolima(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return 1.0 if the output contains an accepted answer, in the same case (adobe-research/NoLiMa).

    Args:
        output: the model's output.
        answers: the accepted answers.
        facts: "match" is "contains", "EM" (the whole output), "lastline_contains" or "lastline_EM".
    """
    match = facts.get("match", "contains")
    text = output if match == "contains" else output.strip()
    if match.startswith("lastline"):
        text = text.split("\n")[-1]
    return float(text in answers if match.endswith("EM") else any(answer in text for answer in answers))


def ndcg(output: str, answers: tuple[str, ...], facts: Facts) -> float:
    """Return NDCG@10 of the passages in the order in which the output first names them.

    Args:
        output: numbers of passages, the most relevant first; a number that no passage has is left out.
        answers: the best order; unused.
        facts: "grades" holds the relevance of each passage by its number.

    The gain of a passage is `2 ** grade - 1`, and its discount the logarithm of its rank plus one to base two.
    """
    grades: Mapping[str, int] = facts["grades"]
    order = [name for name in dict.fromkeys(re.findall(r"\d+", output)) if name in grades][:10]
    best = sorted(grades.values(), reverse=True)[:10]
    return _gain([grades[name] for name in order]) / _gain(best)


def _gain(grades: list[int]) -> float:
    return sum((2**grade - 1) / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))
