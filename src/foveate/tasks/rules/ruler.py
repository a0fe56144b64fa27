"""RULER's rules (NVIDIA/RULER, scripts/eval), and those of its second version (NeMo Skills' and NeMo Gym's ruler2).

Both search the answers as parts of the output, in any case and inside longer words and numbers too: `12` is found in
`123456`. Foveate's own rules do not accept that, so the two kinds of score are not comparable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from foveate.tasks.rules.words import edit_distance

_CONTROLS = re.compile(r"[\x00-\x1f]")
_DOCUMENT = re.compile(r"Document \d+:(?:.*\n)+?\n")


def every(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return the share of the answers that the output contains.

    Args:
        output: the model's output.
        answers: the references.
        facts: "controls" replaces each control character; a new line by default, nothing in kvpress.
    """
    text = _cleaned(output, facts)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def any_of(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return 1.0 if the output contains one of the answers; the rule of RULER's question answering."""
    text = _cleaned(output, facts)
    return float(any(answer.lower() in text for answer in answers))


def soft(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return the second version's score: 1.0 for an answer in the output, else 1 - word error rate, at least 0.

    Args:
        output: the model's output.
        answers: the references.
        facts: "match" is "all" (the mean over the references), "part" (their maximum, after the documents that the
            output repeats are removed) or "2steps" (the mean, over the output's last paragraph).
    """
    match = facts.get("match", "all")
    if match == "part":
        output = _DOCUMENT.sub("", output)
    if match == "2steps":
        output = output.split("\n\n")[-1]
    found = [_soft(output.lower(), answer.lower()) for answer in answers]
    return max(found) if match == "part" else sum(found) / len(found)


def _cleaned(output: str, facts: Mapping[str, Any]) -> str:
    return _CONTROLS.sub(facts.get("controls", "\n"), output.strip()).strip().lower()


def _soft(output: str, answer: str) -> float:
    if answer in output:
        return 1.0
    words = answer.split()
    return max(0.0, 1 - edit_distance(output.split(), words) / len(words)) if words else 0.0
