"""`foveate compare`: a model on a task under several methods, side by side in one run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from foveate._version import __version__
from foveate.bench import known
from foveate.bench.calibration import Learnt
from foveate.bench.comparison.encoding import Prompt, prompts
from foveate.bench.comparison.lanes import Lane
from foveate.bench.comparison.question import Question, ends
from foveate.bench.comparison.results import FORMAT, Comparison
from foveate.bench.comparison.turns import Progress, Turns
from foveate.bench.known import DEFAULT, FULL
from foveate.bench.loading import load, trained_on
from foveate.bench.methods import Contender
from foveate.bench.parts import digest, timing
from foveate.bench.parts.folder import claimed
from foveate.bench.parts.journal import Journal
from foveate.bench.parts.plaindata import version_of
from foveate.core import validate
from foveate.core.errors import OptionError, TaskError
from foveate.host.hf.model import Host, host
from foveate.tasks.base import scores
from foveate.tasks.base.task import Task
from foveate.tasks.base.training_task import TrainingTask
from foveate.tasks.files.prompts import Prompts
from foveate.tasks.files.records import READERS, is_file
from foveate.tasks.parts.token_prompts import TokenPrompts
from foveate.tasks.registry import TASKS, named
from foveate.tasks.text.continuation import Continuation
from foveate.tasks.text.needle import Needle
from foveate.tasks.text.passkeys import Passkeys

RESULTS, JOURNAL = "results.json", "answers.jsonl"
EXAMPLES, LENGTH = 20, 1024


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
    score: str | None = None,
    batch: int = 1,
    out: Path | str = Path("foveate-compare"),
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    chat: bool = False,
    new_tokens: int | None = None,
    renumber: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Run a model on a task under several methods; saves each prompt's answers into `out`, and at the end a table.

    Args:
        model: folder, GGUF file, adapter's folder or hub id of a decoder; None is the lab model.
        task: a name of `foveate.tasks.registry.TASKS`, "mqar", "copy", or a file of prompts and answers (see
            `foveate.tasks.files.prompts`). None is needle, or what a model of `foveate train` was trained on.
        methods: keys of the catalogue (cache policies, or operators to read the prompt with); the full cache always
            runs.
        budget: share of each prompt's full cache that a method may keep, or read, in (0, 1].
        examples: how many prompts.
        length: length of needle prompts in characters.
        score: one of `foveate.tasks.base.scores.SCORES`, or "loss"; None is the task's own.
        batch: prompts of like length that run together.
        out: folder. What an earlier run left there is used again where the model's weights, the prompt and all options
            that matter are the same, unless `fresh`.
        seed: of the task.
        device, dtype: where and in what the model runs.
        trust_remote_code: whether code that lies beside the model's weights may run.
        prompt_field, answer_field: where a file's prompts and answers are, if not where known formats have them.
        chat: put plain prompts into the model's chat template too.
        new_tokens: how many tokens to answer with; None is by the accepted answers.
        renumber: under policies that evict, positions count the tokens that are kept; see `foveate.kv.renumbered`.
            Prompts past the model's context are then read in pieces that fit.
        progress: told about every example.

    A method that fails is a row that says why.

    Raises:
        FoveateError: for anything that cannot be run, before anything is written.
        KeyboardInterrupt: with `(answers found, answers in all)`, after what is measured was saved.
    """
    keys = _asked_for(methods, budget, batch, score)
    drilled = trained_on(model)
    chosen = _task(task or (drilled.name if drilled else None), examples, length, seed, drilled)
    if isinstance(chosen, Prompts):
        chosen = replace(chosen, prompt_field=prompt_field, answer_field=answer_field)
    elif prompt_field or answer_field:
        raise OptionError("prompt_field and answer_field go with a file of prompts as the task")
    with claimed(Path(out)) as folder, timing.threads() as threads:
        earlier = None if fresh else _earlier(folder / RESULTS)
        watch = progress or Silent()
        loaded, tokenizer, source = load(model, device, dtype, trust_remote_code=trust_remote_code, note=watch.say)
        if methods is None and not Host(loaded).attention_modules():
            keys = [FULL]  # nothing to put a method on: the model's layers keep states of their own
        elif keys != [FULL]:
            host(loaded)
        asked = prompts(chosen, tokenizer, loaded, chat=chat, new_tokens=new_tokens, score=score)
        question = _question(chosen, score, asked, tokenizer, loaded, batch)
        versions = _versions()
        world = digest.of(digest.of_model(loaded), device, dtype, versions, digest.of_code())
        result = Comparison(
            model=model or "lab lm", task=chosen.name, seed=seed, device=device, dtype=dtype, budget=budget,
            examples=len(question.prompts), length=getattr(chosen, "length", None), batch=batch,
            versions={**versions, "threads": str(threads)}, metric=question.metric,
            digest=digest.of(world, budget, renumber, question.identity), rows=[],
        )  # fmt: skip
        turns = Turns(loaded, world, Journal(folder / JOURNAL, fresh), watch)
        folders = [path for path in (source, folder) if path is not None]
        learnt = Learnt(Host(loaded), lambda: _passkeys(tokenizer, loaded, question, seed), folders, watch.say)
        lanes = [Lane.of(Contender(key, Host(loaded), budget, renumber), learnt) for key in keys]
        turns.run(lanes, question)
        result.rows.extend(question.row(lane) for lane in lanes)
        _complete(result, earlier)
        result.save(folder / RESULTS)
        return result


def _asked_for(methods: list[str] | None, budget: float, batch: int, score: str | None) -> list[str]:
    """The keys to measure, the full cache first, once all that can be refused before anything is loaded was checked."""
    keys = [FULL, *(key for key in (methods or DEFAULT) if key != FULL)]
    known.check(keys)
    if not 0 < budget <= 1:
        raise OptionError(f"budget={budget} must be above 0 and at most 1, a share of the full cache")
    validate.count("batch", batch, 1)
    if score is not None:
        scores.check(score, ())
    return keys


def _complete(result: Comparison, earlier: Comparison | None) -> None:
    """Add what an earlier run measured for the same question under methods that were not asked for now."""
    if not any(row.answers for row in result.rows):
        raise TaskError(f"no method ran: {result.rows[0].error}")
    if earlier is not None and earlier.digest == result.digest:
        there = {row.method for row in result.rows}
        result.rows.extend(row for row in earlier.rows if row.method not in there and row.answers)


def _task(task: str | None, examples: int | None, length: int | None, seed: int, drilled: TrainingTask | None) -> Task:
    if examples is not None:
        validate.at_least("examples", examples, 1)
    if task in ("mqar", "copy"):
        if drilled is None or drilled.name != task:
            raise TaskError(f'task="{task}" is for a model that `foveate train --task {task}` made')
        if length is not None:
            raise OptionError(f"length={length} goes with the needle task; {task} has the length of the training")
        return TokenPrompts(drilled, examples or EXAMPLES, seed)
    if task == "lm" and drilled is not None:  # trained on short text: judged by its loss on such, not by needles
        size = drilled.length if length is None else length
        return Continuation(length=size, count=examples or EXAMPLES, horizon=max(1, size // 4), seed=seed)
    if task in (None, "needle", "lm"):
        return Needle(length=LENGTH if length is None else length, count=examples or EXAMPLES, seed=seed)
    if task in TASKS:
        return named(task, length, examples, seed)
    if not is_file(task):
        names = ", ".join([*TASKS, "mqar", "copy"])
        raise TaskError(f"task={task!r:.80} must be one of {names}, or a file of prompts: {', '.join(READERS)}")
    if length is not None:
        raise OptionError(f"length={length} goes with the needle task; the prompts of {task} have their own")
    return Prompts(Path(task), examples)


def _question(
    task: Task, score: str | None, asked: list[Prompt], tokenizer: Any, model: PreTrainedModel, size: int
) -> Question:
    """Put together the prompts that every method gets, and how its answers are read and scored."""
    metric = score or task.metric
    scores.check(metric, (prompt.example.answers for prompt in asked))
    forced = None
    if metric == scores.LOSS:
        forced = [[] if prompt.answer_ids is None else prompt.answer_ids[0].tolist() for prompt in asked]
        if not all(forced):
            raise TaskError(f"example {forced.index([]) + 1} of {task.name} has an empty answer, which has no loss")
    named = scores.SCORES.get(metric)
    rule = task.score if score is None or named is None else lambda example, said: named(said, example.answers)
    return Question(asked, metric, rule, forced, size, *ends(tokenizer, model), tokenizer)


def _earlier(file: Path) -> Comparison | None:
    """Load the results of an earlier run; None where there is none, or where another version wrote them."""
    if not file.exists() or version_of(file) not in (None, FORMAT):
        return None
    try:
        return Comparison.load(file)
    except OptionError as error:
        raise OptionError(f"{error}; add --fresh to measure anew, or name another folder") from None


def _passkeys(tokenizer: Any, model: PreTrainedModel, question: Question, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Text with keys to retrieve, about as long as the prompts, for policies that have to learn about the model."""
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    length = max(64, max(prompt.ids.shape[1] for prompt in question.prompts) // 2)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return iter(Passkeys(encode, length=length, count=3, words=6, begin=begin, seed=seed))


def _versions() -> dict[str, str]:
    return {
        "foveate": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
