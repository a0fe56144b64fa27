"""Tasks by name, as `foveate compare --task NAME` takes them; the names need no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foveate.core.errors import unknown
from foveate.tasks.base.task import Task

THIRTEEN = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
#: Each task's name and a short description. The length of those from `ruler/` on is in tokens.
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
    **{f"ruler/{name}": f"RULER's {name} on Python's manual and library" for name in THIRTEEN},
    "ruler/all": "RULER's thirteen tasks in turn, on Python's manual and library",
    "docs_qa": "questions over the standard library's documentation",
    "docs_questions": "five such questions on each context",
    "ranking": "the order in which passages of documentation fit a query",
    "code_completion": "the next line of a module of the standard library",
    "loss_4k": "the next-token loss after 4096 tokens",
    "loss_8k": "the next-token loss after 8192 tokens",
    "trace": "a program run line by line; the trace's length is reported too",
}


def named(name: str, length: int | None = None, count: int | None = None, seed: int = 0) -> Task:
    """Create the task of this name.

    Args:
        name: one of `TASKS`.
        length, count: characters of a prompt, or tokens of a prompt and its answer (see `TASKS`), and number of
            examples; None takes the task's default.
        seed: the seed of the examples.
    """
    from foveate.tasks.text.continuation import Continuation
    from foveate.tasks.text.needle import Needle
    from foveate.tasks.text.ruler import KINDS, Ruler, kind

    if name not in TASKS:
        raise unknown("task", name, TASKS)
    given: dict[str, Any] = {
        option: value for option, value in (("length", length), ("count", count)) if value is not None
    }
    if name in KINDS:
        return kind(name, seed=seed, **given)
    if name.startswith("ruler/"):
        from foveate.tasks.thirteen.tasks import Thirteen, task

        return Thirteen(seed=seed, **given) if name == "ruler/all" else task(name.split("/")[1], seed=seed, **given)
    if name in ("docs_qa", "docs_questions", "ranking", "code_completion", "loss_4k", "loss_8k", "trace"):
        return _library(name, seed, given)
    cls = {"needle": Needle, "ruler": Ruler, "text": Continuation}[name]
    return cls(seed=seed, **given)


def _library(name: str, seed: int, given: dict[str, Any]) -> Task:
    from foveate.tasks.library.completion import Completion
    from foveate.tasks.library.loss import LongText
    from foveate.tasks.library.questions import LibraryQuestions
    from foveate.tasks.library.ranking import Ranking
    from foveate.tasks.library.traces import Traces

    if name.startswith("loss"):
        return LongText(**{"length": 1024 * int(name[5]), **given}, seed=seed)
    if name.startswith("docs"):
        return LibraryQuestions(seed=seed, questions=1 if name == "docs_qa" else 5, **given)
    kinds: dict[str, Callable[..., Task]] = {"ranking": Ranking, "code_completion": Completion, "trace": Traces}
    return kinds[name](seed=seed, **given)
