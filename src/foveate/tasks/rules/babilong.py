"""BABILong's rule (booydar/babilong, babilong/metrics.py): the labels that an output names beside the question's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES = ("no", "yes")
#: The labels of bAbI's twenty tasks.
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _ROOMS),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}


def labels(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return 1.0 if the first sentence names the answer's labels and no other, apart from those of the question.

    Args:
        output: the model's output, read in lower case up to the first full stop or the start of another example.
        answers: the label; several with commas between them in qa8.
        facts: "task", such as "qa1", and "question".

    The release cuts the output at `Question` after it made it lower case, which never happens; this is kept. Labels
    are searched as parts, so that `none` contains `one`.
    """
    text = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    question, target = str(facts.get("question", "")).lower(), answers[0].lower()
    known = {label.lower() for label in LABELS[facts["task"]]}
    named = {label for label in known if label in text} - {label for label in known if label in question}
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return float(named == wanted)


def guessed_task(target: str) -> str | None:
    """Return a task whose labels the target is one of, or None; qa1 stands for all tasks about rooms."""
    parts = {target.lower()} if len(target) <= 3 else set(target.lower().split(","))
    return next((task for task in _GUESSES if parts <= {label.lower() for label in LABELS[task]}), None)


_GUESSES = ("qa1", "qa5", "qa19")
