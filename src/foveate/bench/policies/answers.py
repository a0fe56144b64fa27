"""Retrieval tasks: each prompt is read once, and answered under every policy and budget."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from torch import Tensor

from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.policies.desk import Desk
from foveate.bench.policies.shared import Continued, go_on, read
from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.registry import named

_LEAST = 0.1  # of the full cache's score, for a task that says something
_SPARE = 3  # tokens beyond the expected answer's, so that an answer is seen to end or to run on


def steps(desk: Desk) -> int:
    """How many contenders are to answer how many batches."""
    return len(desk.contenders) * len(desk.plan.tasks) * -(-desk.plan.examples // desk.plan.batch)


def answer(desk: Desk) -> None:
    """Write down every answer that the journal does not have.

    A task whose first prompts the full cache itself fails is not put to the policies: nothing can be lost on it.
    """
    for name in desk.plan.tasks:
        task, (ids, new) = _task(desk, name), prompts(desk, name)
        examples, size = task.examples(), desk.plan.batch
        for start in range(0, len(examples), size):
            chosen = slice(start, start + size)
            _answer(desk, task, examples[chosen], ids[chosen], new)


def is_worth(desk: Desk, name: str) -> bool:
    """Whether the full cache answers a task at all, as its first batch of prompts shows."""
    ids, new = prompts(desk, name)
    found = [desk.known(desk.contenders[0], *what(name, one, new)) for one in ids[: desk.plan.batch]]
    return fmean(record["score"] if record else 0.0 for record in found) >= _LEAST


def prompts(desk: Desk, name: str) -> tuple[Tensor, int]:
    """A task's prompts as ids of one length, and how many tokens to answer with."""
    examples = _task(desk, name).examples()
    longest = max(len(desk.tokenizer(e.answer, add_special_tokens=False).input_ids) for e in examples)
    ids, context = desk.level([desk.encode(example.prompt) for example in examples]), desk.context
    if context is not None and ids.shape[1] + longest + _SPARE > context:
        raise TaskError(f"{name} takes {ids.shape[1]} + {longest + _SPARE} tokens; the model's context holds {context}")
    return ids, longest + _SPARE


def _task(desk: Desk, name: str) -> Task:
    return named(name, desk.plan.characters, desk.plan.examples, desk.plan.seed)


def what(task: str, ids: Tensor, new: int) -> tuple[str, str, int]:
    """What tells one prompt's record from another's."""
    return f"answer to {task}", digest.of(ids.tolist()), new


def _answer(desk: Desk, task: Task, examples: list[Example], ids: Tensor, new: int) -> None:
    def missing(contender: Contender) -> bool:
        return any(desk.known(contender, *what(task.name, row, new)) is None for row in ids)

    reading = None
    full, *others = desk.able()
    for contender in (full, *others):
        if missing(contender) and (contender is full or is_worth(desk, task.name)):
            reading = reading or read(desk.model, ids)
            methods, source = contender.at(ids.shape[1]), reading
            said = desk.attempt(contender, lambda: go_on(desk.model, methods, source, new))  # noqa: B023
            if said is not None:
                found = _records(desk, task, examples, said)
                desk.journal.add(
                    {desk.key(contender, *what(task.name, row, new)): one for row, one in zip(ids, found, strict=True)}
                )
        desk.watch.advance(f"{task.name}: {contender.key} at {contender.budget:.0%}")


def _records(desk: Desk, task: Task, examples: list[Example], said: Continued) -> list[dict[str, Any]]:
    found = []
    for example, ids in zip(examples, said.ids.tolist(), strict=True):
        output = desk.tokenizer.decode(ids, skip_special_tokens=True)
        score = task.score(example, output)
        found.append({"score": score, "output": output, "kept": said.kept, "read": said.read})
    return found
