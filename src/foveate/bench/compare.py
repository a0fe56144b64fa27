"""`foveate compare`: a model on a task under several methods, side by side in one run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

import foveate
from foveate.bench.encoding import Prompt, check_context, prompts
from foveate.bench.loading import load, trained_on
from foveate.bench.measure import measure
from foveate.bench.methods import DEFAULT, FULL, Learnt, candidate, check
from foveate.bench.results import Comparison
from foveate.core import validate
from foveate.core.errors import OptionError, TaskError
from foveate.host.model import Host, host
from foveate.tasks.base import Task
from foveate.tasks.drill import Drill
from foveate.tasks.named import TASKS, named
from foveate.tasks.needle import Needle
from foveate.tasks.passkeys import Passkeys
from foveate.tasks.prompts import Prompts
from foveate.tasks.recited import Recited
from foveate.tasks.records import READERS, kind

RESULTS = "results.json"
EXAMPLES, LENGTH = 20, 1024


class Progress(Protocol):
    """Where progress goes."""

    def start(self, total: int) -> None: ...
    def advance(self, label: str) -> None: ...
    def say(self, label: str) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def start(self, total: int) -> None: ...
    def advance(self, label: str) -> None: ...
    def say(self, label: str) -> None: ...


def compare(
    *,
    model: str | None = None,
    task: str | None = None,
    methods: list[str] | None = None,
    budget: float = 0.35,
    examples: int | None = None,
    length: int | None = None,
    out: Path | str = Path("foveate-compare"),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    chat: bool = False,
    new_tokens: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run a model on a task under several methods; saves `results.json` into `out` after each.

    Args:
        model: folder, GGUF file, adapter's folder or hub id of a decoder; None is the lab model.
        task: a name of `foveate.tasks.named.TASKS`, "mqar", "copy", or a file of prompts and answers (see
            `foveate.tasks.prompts`). None is needle, or what a model of `foveate train` was trained on.
        methods: keys of the catalogue (cache policies, or operators to read the prompt with); the full cache always
            runs.
        budget: share of the full cache that each method may keep, or read, in (0, 1].
        examples: how many prompts.
        length: length of needle prompts in characters.
        out: folder; what an earlier run with the same settings left there is kept, unless `fresh`.
        seed: of the task.
        device, dtype: where and in what the model runs.
        trust_remote_code: whether code that lies beside the model's weights may run.
        prompt_field, answer_field: where a file's prompts and answers are, if not where known formats have them.
        chat: put plain prompts into the model's chat template too.
        new_tokens: how many tokens to answer with; None is by the accepted answers.
        progress: told about every example.

    Raises:
        FoveateError: for anything that cannot be run, before anything is written.
        KeyboardInterrupt: with `(methods done, methods in all)`, after what is measured was saved.
    """
    keys = [FULL, *(key for key in (methods or DEFAULT) if key != FULL)]
    check(keys)
    if not 0 < budget <= 1:
        raise OptionError(f"budget={budget} must be above 0 and at most 1, a share of the full cache")
    drilled = trained_on(model)
    chosen = _task(task or (drilled.name if drilled else None), examples, length, seed, drilled)
    if isinstance(chosen, Prompts):
        chosen = replace(chosen, prompt_field=prompt_field, answer_field=answer_field)
    elif prompt_field or answer_field:
        raise OptionError("prompt_field and answer_field go with a file of prompts as the task")
    loaded, tokenizer, folder = load(
        model, device, dtype, trust_remote_code=trust_remote_code, note=(progress or Silent()).say
    )
    here, batch = Host(loaded), prompts(chosen, tokenizer, loaded, chat=chat, new_tokens=new_tokens)
    check_context(chosen, batch)
    if methods is None and not here.attention_modules():
        keys = [FULL]  # nothing to put a method on: the model's layers keep states of their own
    elif keys != [FULL]:
        host(loaded)
    out = Path(out)
    settings = Comparison(
        model=model or "lab lm", task=chosen.name, seed=seed, device=device, dtype=dtype, budget=budget,
        examples=len(batch), length=getattr(chosen, "length", None), versions=_versions(), rows=[],
    )  # fmt: skip
    result = _resumed(settings, out, keys, fresh)
    todo, watch = [key for key in keys if key not in {row.method for row in result.rows}], progress or Silent()
    watch.start(len(todo) * len(batch))
    folders = [path for path in (folder, out) if path is not None]
    learnt = Learnt(here, lambda: _passkeys(tokenizer, here, batch, seed), folders, watch.say)
    longest = max(prompt.ids.shape[1] for prompt in batch)
    try:
        for key in todo:
            ready = candidate(key, here, budget, longest, learnt)
            result.rows.append(measure(ready, chosen, batch, loaded, tokenizer, lambda label=key: watch.advance(label)))
            result.save(out / RESULTS)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(len(result.rows), len(keys)) from None
    result.rows.sort(key=lambda row: keys.index(row.method))
    result.save(out / RESULTS)
    return result


def _task(task: str | None, examples: int | None, length: int | None, seed: int, drilled: Drill | None) -> Task:
    if examples is not None:
        validate.at_least("examples", examples, 1)
    if task in ("mqar", "copy"):
        if drilled is None or drilled.name != task:
            raise TaskError(f'task="{task}" is for a model that `foveate train --task {task}` made')
        if length is not None:
            raise OptionError(f"length={length} goes with the needle task; {task} has the length of the training")
        return Recited(drilled, examples or EXAMPLES, seed)
    if task in (None, "needle", "lm"):
        return Needle(length=LENGTH if length is None else length, count=examples or EXAMPLES, seed=seed)
    if task in TASKS:
        return named(task, length, examples, seed)
    if kind(Path(task)) not in READERS and not Path(task).exists():
        names = ", ".join([*TASKS, "mqar", "copy"])
        raise TaskError(f"task={task!r} must be one of {names}, or a file of prompts: {', '.join(READERS)}")
    if length is not None:
        raise OptionError(f"length={length} goes with the needle task; the prompts of {task} have their own")
    return Prompts(Path(task), examples)


def _resumed(settings: Comparison, out: Path, keys: list[str], fresh: bool) -> Comparison:
    """What an earlier run with the same settings measured, less what is not asked for now."""
    file = out / RESULTS
    if fresh or not file.exists():
        return settings
    earlier = Comparison.load(file)
    if earlier.settings() != settings.settings():
        return settings
    settings.rows.extend(row for row in earlier.rows if row.method in keys)
    return settings


def _passkeys(tokenizer: Any, here: Host, batch: list[Prompt], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Text with keys to retrieve, about as long as the prompts, for policies that have to learn about the model."""
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    length = max(64, max(prompt.ids.shape[1] for prompt in batch) // 2)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return iter(Passkeys(encode, length=length, count=3, words=6, begin=begin, seed=seed))


def _versions() -> dict[str, str]:
    return {
        "foveate": foveate.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
