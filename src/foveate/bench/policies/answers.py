"""Retrieval tasks: each prompt is answered under every policy and budget, and read once for all that can share it."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from torch import Tensor

from foveate.bench.known import own_tokens
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.policies.model_run import ModelRun
from foveate.bench.policies.shared_prefill import Decoded, decode, prefill
from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task

_LEAST = 0.1  # the lowest score of the full cache at which a task is informative
_SPARE = 3  # tokens beyond the expected answer, which show if the output ends there


def answer_steps(run: ModelRun) -> int:
    """Return the number of batches over all contenders and tasks."""
    return len(run.contenders) * sum(-(-run.plan.count(name) // run.plan.batch) for name in run.plan.tasks)


def measure_answers(run: ModelRun) -> None:
    """Record every answer that the journal does not have.

    If the full cache fails a task's first prompts, the policies skip the task, since they cannot lose anything on it.
    """
    for name in run.plan.tasks:
        task, (ids, new) = run.plan.task(name), prompts(run, name)
        examples, size = task.examples(), run.plan.batch
        for start in range(0, len(examples), size):
            chosen = slice(start, start + size)
            _answer(run, name, task, examples[chosen], ids[chosen], new)


def is_informative(run: ModelRun, name: str) -> bool:
    """Return True if the full cache answers some of a task's first batch of prompts."""
    ids, new = prompts(run, name)
    found = [run.known(run.contenders[0], *answer_key(name, one, new)) for one in ids[: run.plan.batch]]
    return fmean(record["score"] if record else 0.0 for record in found) >= _LEAST


def prompts(run: ModelRun, name: str) -> tuple[Tensor, int]:
    """Encode a task's prompts with equal length; return the ids and the number of tokens to generate."""
    examples = run.plan.task(name).examples()
    longest = max(len(run.tokenizer(e.answer, add_special_tokens=False).input_ids) for e in examples)
    ids, context = run.equalise([run.encode(example.prompt) for example in examples]), run.context
    if context is not None and ids.shape[1] + longest + _SPARE > context:
        needed = f"{ids.shape[1]} + {longest + _SPARE}"
        raise TaskError(f"task={name!r} takes {needed} tokens; the model's context holds {context}")
    return ids, longest + _SPARE


def answer_key(task: str, ids: Tensor, new: int) -> tuple[str, str, int]:
    """Return what identifies one prompt's record."""
    return f"answer to {task}", digest.of(ids.tolist()), new


def _answer(run: ModelRun, name: str, task: Task, examples: list[Example], ids: Tensor, new: int) -> None:
    def missing(contender: Contender) -> bool:
        return any(run.known(contender, *answer_key(name, row, new)) is None for row in ids)

    prefilled = None
    full, *others = run.working()
    for contender in (full, *others):
        if missing(contender) and (contender is full or is_informative(run, name)):
            prefilled = prefilled or prefill(run.model, ids)
            source, own = prefilled, own_tokens(contender.key)
            decoded = run.attempt(
                contender,
                lambda: decode(run.model, contender.at(ids.shape[1]), source, new, own=own),  # noqa: B023
            )
            if decoded is not None:
                found = _records(run, task, examples, decoded)
                keys = [run.key(contender, *answer_key(name, row, new)) for row in ids]
                run.journal.add(dict(zip(keys, found, strict=True)))
        run.progress.advance(f"{name}: {contender.key} at {contender.budget:.0%}")


def _records(run: ModelRun, task: Task, examples: list[Example], decoded: Decoded) -> list[dict[str, Any]]:
    found = []
    for example, ids in zip(examples, decoded.ids.tolist(), strict=True):
        output = run.tokenizer.decode(ids, skip_special_tokens=True)
        score = task.score(example, output)
        found.append({"score": score, "output": output, "kept": decoded.kept, "read": decoded.read})
    return found
