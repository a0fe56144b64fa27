"""`foveate tune`: find the cheapest setting that keeps a share of the full cache's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import fmean

from torch import Tensor

from foveate.bench import known
from foveate.bench.calibration import CalibrationStore
from foveate.bench.chosen_methods import passkeys
from foveate.bench.comparison.encoding import check_context, prompts
from foveate.bench.comparison.evaluation import evaluation_of
from foveate.bench.comparison.interleaved import Progress
from foveate.bench.comparison.method_run import one_line
from foveate.bench.comparison.run import Silent, _versions
from foveate.bench.comparison.task_choice import choose_task, with_fields
from foveate.bench.loading import load, trained_on
from foveate.bench.parts import digest, timing
from foveate.bench.parts.folder import lock_folder
from foveate.bench.parts.journal import Journal
from foveate.bench.recipes.recipe import identified
from foveate.bench.tuning import bounds, holdout, space
from foveate.bench.tuning.examples import LEAST, Drawn, is_prompt_file, split
from foveate.bench.tuning.results import Trial, Tuning
from foveate.bench.tuning.search import Search
from foveate.bench.tuning.setting import Arm, Setting
from foveate.bench.tuning.trials import FULL, Measured, Trials, check_informative
from foveate.core import validate
from foveate.core.catalog import system
from foveate.core.errors import Interrupted, OptionError
from foveate.host.hf.model import host

JOURNAL, RECIPE, RESULTS = "trials.jsonl", "recipe.json", "tuning.json"
SEARCH = 16


@dataclass(frozen=True)
class Plan:
    """The arguments of `tune` that the search needs, with the meaning that they have there."""

    keep: float
    methods: list[str] | None
    budgets: tuple[float, ...]
    search: int
    held_out: int | None
    level: float
    seed: int

    def __post_init__(self) -> None:
        validate.between("keep", self.keep, 0.0, 1.0)
        if not 0.5 <= self.level < 1:
            raise OptionError(f"level={self.level} must be at least 0.5 and under 1")
        if self.keep == 1:
            raise OptionError("keep=1.0 must be under 1: no number of examples shows that nothing is ever lost")
        validate.count("search", self.search, LEAST)
        if self.held_out is not None:
            validate.count("held_out", self.held_out, LEAST)
        if not self.budgets or not all(0 < budget < 1 for budget in self.budgets):
            raise OptionError(f"budgets={self.budgets} must be shares of the full cache, above 0 and under 1")
        known.check(self.methods or [])
        for key in self.methods or []:
            if key not in known.policies() or not (key in space.CODECS or space.evicts(system(key).load())):
                raise OptionError(
                    f"methods: {key} neither drops tokens from the cache nor holds them encoded, which is what tune "
                    f"searches"
                )

    @property
    def pool(self) -> int:
        """The number of held-out examples to draw; enough for a full cache that scores a half."""
        return self.held_out or self.wanted(0.5)

    def wanted(self, full: float) -> int:
        """Return the number of held-out examples: as many as show the loss that is allowed, unless it is given."""
        return self.held_out or max(LEAST, bounds.needed((1 - self.keep) * full, self.level) + 1)


def tune(
    *, model: str | None = None, task: str | None = None, keep: float = 0.98, methods: list[str] | None = None,
    budgets: Sequence[float] = space.BUDGETS, search: int = SEARCH, held_out: int | None = None,
    level: float = bounds.LEVEL, length: int | None = None, score: str | None = None,
    out: Path | str = Path("foveate-tune"), seed: int = 0, device: str = "cpu", dtype: str = "float32",
    trust_remote_code: bool = False, prompt_field: str | None = None, answer_field: str | None = None,
    chat: bool = False, new_tokens: int | None = None, fresh: bool = False, progress: Progress | None = None,
) -> Tuning:  # fmt: skip
    """Find the setting with the fewest bytes of cache that keeps `keep` of the full cache's score.

    Policies, budgets and options are searched by successive halving, then codecs for the tokens that stay, and a
    budget for each layer by measured sensitivities. What holds is tested on examples that the search has not seen. The
    result is a recipe in `out`. Each answer is recorded at once, and the same call resumes after an interruption.

    Args:
        model: a folder, GGUF file, adapter's folder or hub id of a decoder; None is the lab model.
        task: as in `compare`: a name, or a file of prompts and answers; None is the training task of a model of
            `foveate train`, else needle.
        keep: the share of the full cache's score to keep. For the next-token loss, which is better if lower, 0.98
            allows 2 % more.
        methods: keys of policies that evict, and of codecs for the tokens that stay; None searches all of the
            catalogue, except those that have to learn about the model first and have not.
        budgets: the shares of the full cache to try, for policies and for single layers.
        search: the number of examples to search with.
        held_out: the number of further examples to test with; None takes as many as can show the loss that is allowed,
            about 160 for a loss of 2 % at 95 %. Both are smaller if a file holds fewer.
        level: the confidence of the claim.
        length: the length of the prompts in characters, for tasks that generate them.
        score: as in `compare`; None is the task's own.
        out: the folder of the recipe, of `tuning.json` and of the answers so far.
        seed: the seed of the task, and of the split of a file into search and held-out examples.
        device, dtype, trust_remote_code, prompt_field, answer_field, chat, new_tokens: as in `compare`.
        fresh: True measures everything again.
        progress: receives the progress.

    Raises:
        FoveateError: if anything cannot be run.
        Interrupted: with the number of answers that this run made; they are kept.
    """
    plan = Plan(keep, methods, tuple(sorted(set(budgets))), search, held_out, level, seed)
    count = None if is_prompt_file(task) else plan.search + plan.pool
    chosen = with_fields(choose_task(task, count, length, seed, trained_on(model)), prompt_field, answer_field)
    examples, tests = split(chosen, plan.search, plan.pool, seed)
    both = Drawn(chosen, (*examples, *tests))
    progress = progress or Silent()
    with lock_folder(Path(out)) as folder, timing.threads():
        loaded, tokenizer, source = load(model, device, dtype, trust_remote_code=trust_remote_code, note=progress.say)
        here = host(loaded)
        encoded = prompts(both, tokenizer, loaded, chat=chat, new_tokens=new_tokens, score=score)
        check_context(both, encoded)
        evaluation = evaluation_of(both, score, encoded, tokenizer, loaded, 1)
        environment = digest.of(digest.of_model(loaded), device, dtype, _versions(), digest.of_code())
        length = round(fmean(prompt.ids.shape[1] for prompt in encoded))
        folders = [path for path in (source, folder) if path is not None]
        store = CalibrationStore(here, partial(passkeys, tokenizer, length, seed), folders, progress.say)
        arms, learnt, failed = _arms(plan, store, folders)
        trials = Trials(loaded, evaluation, Journal(folder / JOURNAL, fresh), environment, progress, learnt)
        sizes = len(examples), len(tests)
        setting, result = _outcome(trials, plan, arms, failed, sizes, space.layers_of(here), folder)
        result = replace(result, model=model or "lab lm", task=chosen.name)
        return _save(setting, result, trials, length, folder)


def _outcome(
    trials: Trials, plan: Plan, arms: Sequence[Arm], failed: dict[str, str], sizes: tuple[int, int],
    layers: Sequence[int], folder: Path,
) -> tuple[Setting, Tuning]:  # fmt: skip
    """Search on the first examples and test on those behind them; `sizes` counts both."""
    searched, most = sizes
    try:
        found = _search(trials, plan, arms, range(searched), layers)
        # the full cache may score a little less on the held-out examples
        count = min(most, plan.wanted(0.95 * min(1.0, trials.full_score(found.examples, "full cache"))))
        full, tested = _test(trials, plan, found, range(searched, searched + count))
    except KeyboardInterrupt:
        raise Interrupted(trials.calls, trials.calls, folder) from None
    return _result(trials, plan, found, tested, full, count, failed)


def _arms(
    plan: Plan, store: CalibrationStore, folders: Sequence[Path]
) -> tuple[list[Arm], dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the policies to search, what they learnt of the model, and the reasons why others cannot run."""
    learnt: dict[str, dict[str, Tensor]] = {}
    failed: dict[str, str] = {}
    arms = []
    for key in plan.methods or space.policies():
        if key in space.CODECS:
            continue
        if (
            plan.methods is None
            and space.learns(key)
            and not any((f / f"{key}.safetensors").is_file() for f in folders)
        ):
            failed[key] = "left out: it has to learn about the model first; name it in methods"
            continue
        try:
            if found := store(system(key).load(), key):
                learnt[key] = found
            arms.append(Arm(key))
        except Exception as error:  # noqa: BLE001  a policy that fails is left out, with its reason
            failed[key] = one_line(error)
    return arms, learnt, failed


def _search(trials: Trials, plan: Plan, arms: Sequence[Arm], examples: Sequence[int], layers: Sequence[int]) -> Search:
    full = trials.full_score(examples, "full cache")
    check_informative(full, trials.bounded, "the examples of the search")
    found = Search(trials, examples, (1 - plan.keep) * full, plan.budgets, layers, space.codecs(plan.methods))
    found.run(arms)
    return found


def _test(trials: Trials, plan: Plan, found: Search, examples: Sequence[int]) -> tuple[float, list[holdout.Test]]:
    """Return the full cache's score on held-out examples, and the tests."""
    full = trials.full_score(examples, "full cache, held-out", shared=False)
    check_informative(full, trials.bounded, "the held-out examples")
    most = (1 - plan.keep) * full
    tests = holdout.test(trials, found.candidates(), examples, most, plan.level, trials.bounded)
    return full, tests


def _tried(trials: Trials, found: Search, tests: Sequence[holdout.Test], failed: dict[str, str]) -> list[Trial]:
    """Return all that was tried: on all examples of the search, on fewer of them, and on held-out ones."""
    known = set(found.examples)
    rows = []
    for setting, one in trials.measured.items():
        some = Measured({number: outcome for number, outcome in one.outcomes.items() if number in known}, one.failed)
        if setting == FULL or not (some.outcomes or some.failed):
            continue
        if some.failed:
            rows.append(Trial(setting.label, nan, nan, len(some.outcomes), f"cannot run: {some.failed}"))
            continue
        complete = len(some.outcomes) == len(known)
        good = some.lost <= found.most + 1e-9
        verdict = "holds" if good and complete else "dropped early" if good else "loses too much"
        rows.append(Trial(setting.label, some.share, some.lost, len(some.outcomes), verdict))
    rows += [Trial(key, nan, nan, 0, f"cannot run: {why}") for key, why in failed.items()]
    for test in tests:
        one = test.measured
        share, lost = (one.share, one.lost) if one.outcomes else (nan, nan)
        verdict = "passed" if test.passed else "failed"
        rows.append(Trial(test.setting.label, share, lost, len(one.outcomes), verdict, held_out=True))
    return rows


def _result(
    trials: Trials, plan: Plan, found: Search, tests: Sequence[holdout.Test], full: float, held_out: int,
    failed: dict[str, str],
) -> tuple[Setting, Tuning]:  # fmt: skip
    """Return the cheapest setting that passed, and what is known of it."""
    passed = [test for test in tests if test.passed]
    best = passed[-1] if passed else None
    setting = best.setting if best else FULL
    strict = holdout.is_certain(held_out, (1 - plan.keep) * full, plan.level, trials.bounded)
    share, lost, bound = (best.measured.share, best.measured.lost, best.bound) if best else (1.0, 0.0, 0.0)
    return setting, Tuning(
        model="", task="", metric=trials.evaluation.metric, keep=plan.keep, level=plan.level, setting=setting.label,
        recipe="", share=share, score=best.measured.score if best else full, full_score=full, lost=lost / full,
        bound=bound / full, is_certain=strict, examples=len(found.examples), held_out=held_out, calls=trials.calls,
        notes=found.notes, tried=_tried(trials, found, tests, failed | found.failed),
    )  # fmt: skip


def _save(setting: Setting, result: Tuning, trials: Trials, length: int, folder: Path) -> Tuning:
    """Write the recipe and the results."""
    model, architecture = identified(trials.model)
    about = {
        "made by": "foveate tune", "model": result.model, "task": result.task, "score": result.score,
        "full score": result.full_score, "share of the bytes": result.share, "claim": result.claim(),
    }  # fmt: skip
    recipe = replace(setting.recipe(trials.learnt), model=model, architecture=architecture, length=length, about=about)
    result = replace(result, recipe=str(recipe.write(folder / RECIPE)))
    result.save(folder / RESULTS)
    return result
