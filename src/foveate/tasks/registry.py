"""Tasks by name, as `foveate compare --task NAME` takes them; the names need no torch."""

from __future__ import annotations

from foveate.core.errors import unknown
from foveate.tasks.base.task import Task

#: Each task's name and a short description.
TASKS = {
    "needle": "one of several pass keys in real text",
    "ruler": "the six tasks below in turn",
    "niah_single": "one pass key in real text",
    "niah_multikey": "one of eight names' pass keys",
    "niah_multivalue": "three pass keys of one name",
    "niah_multiquery": "three of six names' pass keys",
    "variable_tracking": "the variables that a value was assigned to",
    "common_words": "the most common words of a list",
    "text": "the next-token loss on long real text",
}


def named(name: str, length: int | None = None, count: int | None = None, seed: int = 0) -> Task:
    """Create the task of this name.

    Args:
        name: one of `TASKS`.
        length, count: characters of a prompt, and number of examples; None takes the task's default.
        seed: the seed of the examples.
    """
    from foveate.tasks.text.continuation import Continuation
    from foveate.tasks.text.needle import Needle
    from foveate.tasks.text.ruler import KINDS, Ruler, kind

    if name not in TASKS:
        raise unknown("task", name, TASKS)
    given = {option: value for option, value in (("length", length), ("count", count)) if value is not None}
    if name in KINDS:
        return kind(name, seed=seed, **given)
    cls = {"needle": Needle, "ruler": Ruler, "text": Continuation}[name]
    return cls(seed=seed, **given)
