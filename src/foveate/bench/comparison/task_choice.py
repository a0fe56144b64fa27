"""The task of a comparison, chosen by its name, a file, or the model's training."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from foveate.core import validate
from foveate.core.errors import OptionError, TaskError
from foveate.tasks.base.task import Task
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.files.benchmarks.nolima import NoLiMa, is_needle_set
from foveate.tasks.files.prompts import Prompts
from foveate.tasks.files.records import READERS, is_file
from foveate.tasks.parts.token_prompts import TokenPrompts
from foveate.tasks.registry import TASKS, named
from foveate.tasks.text.continuation import Continuation
from foveate.tasks.text.needle import Needle

EXAMPLES, LENGTH = 20, 1024


def choose_task(
    task: str | None, examples: int | None, length: int | None, seed: int, trained_on: TrainingTask | None
) -> Task:
    """Return the task of this name or file; None is the model's training task, else the needle.

    Args:
        task: a name, or a file of prompts.
        examples, length, seed: see `compare`.
        trained_on: the task that `foveate train` trained the model on, or None.
    """
    if examples is not None:
        validate.at_least("examples", examples, 1)
    task = task or (trained_on.name if trained_on else None)
    count = examples or EXAMPLES
    if task in ("mqar", "copy"):
        return _token_prompts(task, count, length, seed, trained_on)
    if task == "lm" and trained_on is not None:  # such a model saw only short texts, in which it cannot find needles
        size = trained_on.length if length is None else length
        return Continuation(length=size, count=count, horizon=max(1, size // 4), seed=seed)
    if task in (None, "needle", "lm"):
        return Needle(length=LENGTH if length is None else length, count=count, seed=seed)
    if task in TASKS:
        return named(task, length, examples, seed)
    if not is_file(task):
        near = get_close_matches(str(task), [*TASKS, "mqar", "copy"], 3, 0.5) or ["needle", "docs_qa", "ruler/all"]
        raise TaskError(
            f"task={task!r:.80} is no task (such as {', '.join(near)}; see foveate compare --help), and no file of "
            f"prompts: {', '.join(READERS)}"
        )
    if is_needle_set(Path(task)):
        return NoLiMa(Path(task), NoLiMa.length if length is None else length, count, seed)
    if length is not None:
        raise OptionError(f"length={length} goes with the needle task; the prompts of {task} have their own")
    return Prompts(Path(task), examples)


def _token_prompts(
    task: str, count: int, length: int | None, seed: int, trained_on: TrainingTask | None
) -> TokenPrompts:
    if trained_on is None or trained_on.name != task:
        raise TaskError(f'task="{task}" needs a model that `foveate train --task {task}` trained')
    if length is not None:
        raise OptionError(f"length={length} goes with the needle task; {task} has the length of the training")
    return TokenPrompts(trained_on, count, seed)


def with_fields(task: Task, prompt_field: str | None, answer_field: str | None, turns: str | None = None) -> Task:
    """Return the task with the named fields of its file; only a file of prompts has such fields."""
    if isinstance(task, Prompts):
        found = replace(task, prompt_field=prompt_field, answer_field=answer_field)
        return found if turns is None else replace(found, turns=turns)
    if turns is not None:
        raise OptionError(f'turns="{turns}" goes with a file of prompts as the task')
    if isinstance(task, NoLiMa) and not answer_field:
        return replace(task, template=prompt_field)
    if prompt_field or answer_field:
        field = "prompt_field" if prompt_field else "answer_field"
        raise OptionError(f"{field}={prompt_field or answer_field!r} goes with a file of prompts as the task")
    return task
