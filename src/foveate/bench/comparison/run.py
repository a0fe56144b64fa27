"""`foveate compare`: run a model on a task under several methods, side by side."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from foveate._version import __version__
from foveate.bench import known, own_methods
from foveate.bench.calibration import CalibrationStore
from foveate.bench.comparison import history
from foveate.bench.comparison.encoding import prompts, tokens_of
from foveate.bench.comparison.evaluation import Evaluation, evaluation_of
from foveate.bench.comparison.history import RESULTS
from foveate.bench.comparison.interleaved import InterleavedRun, Progress, answered
from foveate.bench.comparison.lost import Losses
from foveate.bench.comparison.method_run import MethodRun
from foveate.bench.comparison.results import FORMAT, Comparison, Row
from foveate.bench.comparison.task_choice import choose_task, with_fields
from foveate.bench.known import DEFAULT, FULL
from foveate.bench.loading import load, trained_on
from foveate.bench.methods import Contender
from foveate.bench.own_methods import OwnContender
from foveate.bench.parts import digest, timing
from foveate.bench.parts.folder import lock_folder
from foveate.bench.parts.journal import Journal
from foveate.bench.parts.plaindata import version_of
from foveate.bench.recipes.contender import contender, write_recipes
from foveate.core import validate
from foveate.core.errors import Interrupted, OptionError, TaskError
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.tasks.base import scores
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Task
from foveate.tasks.text.passkeys import Passkeys

JOURNAL, RECIPES = "answers.jsonl", "recipes"
QUERIES = ("both", "aware")


class Silent:
    """Progress that is not shown."""

    def start(self, total: int) -> None: ...
    def advance(self, label: str) -> None: ...
    def say(self, label: str) -> None: ...


@dataclass(frozen=True)
class Options:
    """The arguments of `compare` that the measurement needs, with the meaning that they have there."""

    model: str | None
    methods: list[str] | None
    budgets: list[float]
    score: str | None
    batch: int
    seed: int
    device: str
    dtype: str
    trust_remote_code: bool
    chat: bool
    new_tokens: int | None
    renumber: bool
    lost: bool
    fresh: bool
    query: str = QUERIES[0]
    own: dict[str, Method] = field(default_factory=dict)

    def keys(self) -> list[str]:
        """Return the keys of the methods, the full cache first, after checking all that needs no model."""
        keys = [FULL, *(key for key in (self.methods or DEFAULT) if key != FULL)]
        known.check([key for key in keys if key not in self.own])
        _check_budgets(self.budgets)
        validate.count("batch", self.batch, 1)
        validate.one_of("query", self.query, QUERIES)
        if self.score is not None:
            scores.check(self.score, ())
        return keys


def compare(
    *, model: str | None = None, task: str | None = None, methods: Sequence[str | Method] | None = None,
    budget: float = 0.35, budgets: Sequence[float] | None = None, examples: int | None = None,
    length: int | None = None, score: str | None = None, batch: int = 1, out: Path | str = Path("foveate-compare"),
    seed: int = 0, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False,
    prompt_field: str | None = None, answer_field: str | None = None, chat: bool = False,
    new_tokens: int | None = None, renumber: bool = False, lost: bool = False, fresh: bool = False,
    query: str = "both", turns: str | None = None, progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Run a model on a task under several methods; save each prompt's answers to `out`, and a table at the end.

    A method that fails gets a row with the reason.

    Args:
        model: a folder, GGUF file, adapter's folder or hub id of a decoder; None is the lab model.
        task: a name of `foveate.tasks.registry.TASKS`, "mqar", "copy", or a file of prompts and answers (see
            `foveate.tasks.files.prompts`). None is the training task of a model of `foveate train`, else needle.
        methods: keys of the catalogue (cache policies, or operators to read the prompt with), and files of recipes
            (`foveate.save`), which keep their own budgets, or methods of your own as they are, such as
            `ValueNorm(share=0.25)`; the full cache always runs.
        budget: the share of each prompt's full cache that a method may keep, or read, in (0, 1].
        budgets: several such shares, in place of `budget`: every method runs at each of them, in one run. Policies that
            read a prompt densely then read most prompts only once for all their budgets; see `MethodRun.shares`.
        examples: how many prompts.
        length: the length of prompts that a task makes, in characters or tokens as the task says.
        score: one of `foveate.tasks.base.scores.SCORES`, or "loss"; None is the task's own.
        batch: how many prompts of similar length run together.
        out: the output folder, which also gets a recipe of each method. Results of an earlier run in it are reused if
            the model's weights, the prompt and all relevant options are the same, unless `fresh`.
        seed: the seed of the task.
        device, dtype: the device and number format of the model.
        trust_remote_code: True lets code from the model's folder or repository run.
        prompt_field, answer_field: the fields of a file's prompts and answers; None takes those of a known format.
        chat: True applies the model's chat template to plain prompts too.
        new_tokens: how many tokens to generate; None depends on the accepted answers.
        renumber: under policies that evict, let positions count the kept tokens; see `foveate.kv.renumbered`. Prompts
            past the model's context are then read in pieces that fit.
        lost: True reads the examples that a method breaks and the full cache solves once more, and says what the full
            cache looked up for its answer and whether the method had dropped it; see `foveate.bench.comparison.lost`.
        fresh: True measures everything again.
        query: "both" also measures methods that do not know the question while they compress the context, for prompts
            that are divided into the two; "aware" leaves that out.
        turns: see `foveate.tasks.files.prompts.Prompts`; None takes its default.
        progress: receives the progress.

    Raises:
        FoveateError: if anything cannot be run; nothing has been written then.
        Interrupted: with the number of answers, and of all, after the results so far were saved.
    """
    shares = [budget] if budgets is None else sorted(budgets)
    names, own = own_methods.named(methods)
    options = Options(
        model, names, shares, score, batch, seed, device, dtype, trust_remote_code, chat, new_tokens, renumber, lost,
        fresh, query, own,
    )  # fmt: skip
    keys = options.keys()
    chosen = with_fields(
        choose_task(task, examples, length, seed, trained_on(model)), prompt_field, answer_field, turns
    )
    with lock_folder(Path(out)) as folder, timing.threads() as threads:
        return _measure(options, keys, chosen, folder, threads, progress or Silent())


def _measure(
    options: Options, keys: list[str], task: Task, folder: Path, threads: int, progress: Progress
) -> Comparison:
    earlier = None if options.fresh else _earlier(folder / RESULTS)
    model, tokenizer, source = load(
        options.model, options.device, options.dtype, trust_remote_code=options.trust_remote_code, note=progress.say
    )
    keys, task = _applicable(keys, options, model), task.sized(tokens_of(tokenizer))
    encoded = prompts(task, tokenizer, model, chat=options.chat, new_tokens=options.new_tokens, score=options.score)
    agnostic = options.query == QUERIES[0] and keys != [FULL]
    evaluation = evaluation_of(task, options.score, encoded, tokenizer, model, options.batch, agnostic)
    if options.lost and evaluation.metric == LOSS:
        raise OptionError("lost=True needs answers that are right or wrong; it does not go with the loss as the score")
    versions = _versions()
    environment = digest.of(digest.of_model(model), options.device, options.dtype, versions, digest.of_code())
    result = Comparison(
        model=options.model or "lab lm", task=task.name, seed=options.seed, device=options.device, dtype=options.dtype,
        budgets=options.budgets, examples=len(encoded), length=getattr(task, "length", None), batch=options.batch,
        versions={**versions, "threads": str(threads)}, metric=evaluation.metric,
        digest=digest.of(environment, options.budgets, options.renumber, evaluation.identity), rows=[],
    )  # fmt: skip
    folders = [path for path in (source, folder) if path is not None]
    data = partial(_passkeys, tokenizer, evaluation, options.seed)
    store = CalibrationStore(Host(model), data, folders, progress.say)
    runs = [run for key in keys for run in _runs(key, Host(model), options, store)]
    journal = Journal(folder / JOURNAL, options.fresh)
    InterleavedRun(model, environment, journal, progress).run(runs, evaluation)
    rows = [evaluation.row(run) for run in runs]
    if options.lost:
        rows = _lost(Losses(model, environment, journal, evaluation, progress.say), rows, runs)
    result.rows.extend(rows)
    _add_earlier_rows(result, earlier)
    result.save(folder / RESULTS)
    history.record(result, folder)
    longest = max(prompt.ids.shape[1] for prompt in encoded)
    catalogued = [run.contender for run in runs if run.records and run.contender.key not in options.own]
    write_recipes(catalogued, folder / RECIPES, longest)
    return result


def _lost(losses: Losses, rows: list[Row], runs: list[MethodRun]) -> list[Row]:
    """Add what each method lost; an interrupt loses no answer."""
    try:
        return losses.add(rows, runs)
    except KeyboardInterrupt:
        raise Interrupted(answered(runs), answered(runs)) from None


def _runs(key: str, host: Host, options: Options, store: CalibrationStore) -> list[MethodRun]:
    """Start a method's run at each budget, or one run if it takes none."""
    if key in options.own:
        each: list[Contender] = [OwnContender(key, host, options.own[key])]
    else:
        each = [contender(key, host, budget, options.renumber) for budget in options.budgets]
    each = each if each[0].takes_budget else each[:1]
    found = [MethodRun.of(contender, store, turn, len(each)) for turn, contender in enumerate(each)]
    for run in found:
        run.warm = found[0].warm
    return found


def _check_budgets(budgets: list[float]) -> None:
    for budget in budgets:
        if not 0 < budget <= 1:
            raise OptionError(f"budget={budget} must be above 0 and at most 1, a share of the full cache")
    if not budgets or len(set(budgets)) < len(budgets):
        raise OptionError(f"budgets={','.join(map(str, budgets))} must name at least one share, and each only once")


def _applicable(keys: list[str], options: Options, model: PreTrainedModel) -> list[str]:
    """Return the methods that can run; without attention, the default is the full cache alone."""
    if options.methods is None and not Host(model).attention_modules():
        return [FULL]
    if keys != [FULL]:
        host(model)  # refuses a model that methods cannot be applied to
    return keys


def _add_earlier_rows(result: Comparison, earlier: Comparison | None) -> None:
    """Add an earlier run's rows of other methods, if its settings were the same."""
    if not any(row.answers for row in result.rows):
        raise TaskError(f"no method ran: {result.rows[0].error}")
    if earlier is not None and earlier.digest == result.digest:
        present = {row.id for row in result.rows}
        result.rows.extend(row for row in earlier.rows if row.id not in present and row.answers)


def _earlier(file: Path) -> Comparison | None:
    """Load the results of an earlier run; None if there are none, or another version wrote them."""
    if not file.exists() or version_of(file) not in (None, FORMAT):
        return None
    try:
        return Comparison.load(file)
    except OptionError as error:
        raise OptionError(f"{error}; add --fresh to measure again, or name another folder") from None


def _passkeys(tokenizer: Any, evaluation: Evaluation, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw texts with pass keys, about half as long as the longest prompt, on which policies calibrate."""
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    length = max(64, max(prompt.ids.shape[1] for prompt in evaluation.prompts) // 2)

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
