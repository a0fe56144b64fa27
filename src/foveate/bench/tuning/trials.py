"""The measurements of settings on examples: each is made once, and recorded at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import fmean, median
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from foveate.bench.comparison.evaluation import Evaluation
from foveate.bench.comparison.interleaved import Progress
from foveate.bench.comparison.method_run import one_line
from foveate.bench.parts import digest
from foveate.bench.parts.journal import Journal
from foveate.bench.tuning.answers import Answered, answer, beginning, equal
from foveate.bench.tuning.setting import Arm, Learnt, Setting
from foveate.core.errors import TaskError
from foveate.host import Host, Method, held
from foveate.tasks.base.scores import LOSS

FULL = Setting()
#: Bytes of beginnings of prompts that are kept for later settings.
_ROOM = 2**29


@dataclass(frozen=True)
class Outcome:
    """A setting on one example.

    Args:
        score: 0..1, or the next-token loss.
        lost: what is lost of the full cache's score; negative for a gain.
        share: bytes of the cache as a share of the full cache's.
        ms: milliseconds of a later token, a median.
        damage: the increase of the loss of the full cache's own answer; 0 if it was not measured.
    """

    score: float
    lost: float
    share: float
    ms: float
    damage: float = 0.0


@dataclass
class Measured:
    """A setting on several examples.

    Args:
        outcomes: by the number of the example.
        failed: the reason why it cannot run; empty if it can.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    failed: str = ""

    @property
    def lost(self) -> float:
        return fmean(outcome.lost for outcome in self.outcomes.values())

    @property
    def share(self) -> float:
        return fmean(outcome.share for outcome in self.outcomes.values())

    @property
    def ms(self) -> float:
        return median(outcome.ms for outcome in self.outcomes.values())

    @property
    def damage(self) -> float:
        return fmean(outcome.damage for outcome in self.outcomes.values())

    @property
    def score(self) -> float:
        return fmean(outcome.score for outcome in self.outcomes.values())


class Trials:
    """Measures settings on the examples of a task.

    Args:
        model: the model.
        evaluation: the prompts and the score.
        journal: holds known results, and receives new ones.
        environment: the digest of the model and of all else that is common to all results.
        progress: receives the progress.
        learnt: what each policy learnt of the model.

    Attributes:
        calls: answers that were made in this run.
        measured: all settings that were measured, with what is known of each.
    """

    def __init__(
        self, model: PreTrainedModel, evaluation: Evaluation, journal: Journal, environment: str, progress: Progress,
        learnt: Learnt,
    ) -> None:  # fmt: skip
        self.model, self.evaluation, self.journal, self.environment = model, evaluation, journal, environment
        self.progress, self.learnt, self.calls = progress, learnt, 0
        self.measured: dict[Setting, Measured] = {}
        self._made: dict[tuple[Setting, int], tuple[Method, ...]] = {}
        self._shares: dict[Arm, bool] = {}
        self._identities: dict[Setting, str] = {}
        self._begun: dict[int, DynamicCache | None] = {}
        self._room = _ROOM

    # -- what the search asks for --------------------------------------------------------------------------------------

    def measure(
        self, settings: Iterable[Setting], examples: Sequence[int], stage: str, *, shared: bool = True,
        most: float | None = None, damage: bool = False,
    ) -> dict[Setting, Measured]:  # fmt: skip
        """Measure settings on examples; return what is known of each on these examples.

        Args:
            settings: the settings.
            examples: their numbers.
            stage: named in the progress.
            shared: True lets settings share the beginning of a prompt, where that changes nothing.
            most: a setting that loses more than this on average, whatever the other examples give, is measured no
                further. None measures all.
            damage: True forces the full cache's own answer, and measures the increase of its loss.
        """
        found = {setting: self.measured.setdefault(setting, Measured()) for setting in settings}
        here: dict[Setting, Measured] = {setting: Measured(failed=one.failed) for setting, one in found.items()}
        self.progress.start(len(here) * len(examples))
        spare = {number: self._spare(number, shared) for number in examples} if most is not None else {}
        for at, number in enumerate(examples):
            begun = _Beginning(self, number)
            left = sum(spare.get(later, 0.0) for later in examples[at:])
            for setting, one in here.items():
                self.progress.advance(f"{stage}: {setting.label}")
                lost = sum(outcome.lost for outcome in one.outcomes.values())
                if one.failed or (most is not None and lost - left > most * len(examples) + 1e-9):
                    continue
                try:
                    outcome = self._outcome(setting, number, shared, damage, begun)
                except Exception as error:  # noqa: BLE001  a setting that fails is left out, with its reason
                    one.failed = found[setting].failed = one_line(error)
                    continue
                one.outcomes[number] = outcome
                if not damage:
                    found[setting].outcomes[number] = outcome
        return here

    def full_score(self, examples: Sequence[int], stage: str, shared: bool = True) -> float:
        """Return the full cache's mean score."""
        found = self.measure([FULL], examples, stage, shared=shared)[FULL]
        if found.failed:
            raise TaskError(f"the full cache cannot answer: {found.failed}")
        return found.score

    @property
    def bounded(self) -> bool:
        """True for scores in 0..1, and False for next-token losses."""
        return self.evaluation.metric != LOSS

    # -- one measurement -----------------------------------------------------------------------------------------------

    def _outcome(self, setting: Setting, number: int, shared: bool, damage: bool, begun: _Beginning) -> Outcome:
        full = self._record(FULL, number, shared, None, begun)
        forced = self._forced(number, full["ids"]) if damage else None
        base = full if forced is None else self._record(FULL, number, shared, forced, begun)
        record = base if setting == FULL else self._record(setting, number, shared, forced, begun)
        score, best = self._score(number, record), self._score(number, base)
        lost = best - score if self.bounded else score - best
        more = fmean(record["losses"]) - fmean(base["losses"]) if forced else 0.0
        return Outcome(score, lost, record["bytes"] / max(1, base["bytes"]), record["ms"], more)

    def _record(
        self, setting: Setting, number: int, shared: bool, forced: list[int] | None, begun: _Beginning
    ) -> dict[str, Any]:
        """Return the journal's record of a measurement, which is made if there is none."""
        batch = self.evaluation.batches[number]
        shared = shared and self._shared(setting, number)
        way = "shared" if shared else "own"
        key = digest.of(self.environment, self._identity(setting), batch.identity, way, forced)
        known = self.journal.get(key)
        if known is None:
            found = self._answer(setting, number, forced, begun() if shared else None)
            ms = [1e3 * second for second in found.seconds if isfinite(second)]
            known = {
                "ids": found.ids, "losses": found.losses, "bytes": found.bytes, "ms": median(ms) if ms else 0.0,
            }  # fmt: skip
            self.journal.add({key: known})
        return known

    def _answer(self, setting: Setting, number: int, forced: list[int] | None, begun: DynamicCache | None) -> Answered:
        batch = self.evaluation.batches[number]
        given = forced if forced is not None else None if batch.forced is None else batch.forced[0].tolist()
        self.calls += 1
        steps = batch.steps if forced is None else len(forced)
        return answer(self.model, self._methods(setting, batch.length), batch.ids, steps, given, begun)

    def _methods(self, setting: Setting, length: int) -> tuple[Method, ...]:
        key = (setting, length)
        if key not in self._made:
            self._made[key] = setting.methods(Host(self.model), length, self.learnt)
        return self._made[key]

    def _identity(self, setting: Setting) -> str:
        if setting not in self._identities:
            self._identities[setting] = setting.identity(self.learnt)
        return self._identities[setting]

    def _shared(self, setting: Setting, number: int) -> bool:
        """Return whether a setting keeps the same tokens after a shared beginning as if it reads the whole prompt.

        That is found out once for each arm, on one example. With a codec it never is the same: the tokens after the
        beginning would read codes, where a prompt that is read as a whole is encoded at its end.
        """
        return setting.codec is None and all(self._arm_shares(part.arm, number) for part in setting.parts)

    def _arm_shares(self, arm: Arm, number: int) -> bool:
        if arm not in self._shares:
            batch = self.evaluation.batches[number]
            probe = Setting.of(arm, 0.25)
            key = digest.of(self.environment, self._identity(probe), "shares")
            known = self.journal.get(key)
            if known is None:
                begun = beginning(self.model, batch.ids)
                same = begun is not None and equal(self._short(probe, batch, None), self._short(probe, batch, begun))
                known = {"shares": same}
                self.journal.add({key: known})
            self._shares[arm] = bool(known["shares"])
        return self._shares[arm]

    def _short(self, setting: Setting, batch: Any, begun: DynamicCache | None) -> Answered:
        self.calls += 1
        return answer(self.model, self._methods(setting, batch.length), batch.ids, 1, None, begun)

    def _forced(self, number: int, ids: list[int]) -> list[int]:
        """Return the full cache's own answer up to its end, or the answer that the task forces."""
        batch = self.evaluation.batches[number]
        if batch.forced is not None:
            return batch.forced[0].tolist()
        end = next((at + 1 for at, token in enumerate(ids) if token in self.evaluation.stops), len(ids))
        return ids[:end]

    def _score(self, number: int, record: dict[str, Any]) -> float:
        if not self.bounded:
            return fmean(record["losses"])
        example = self.evaluation.batches[number].prompts[0].example
        return float(self.evaluation.rule(example, self.evaluation._text(record["ids"])))

    def _spare(self, number: int, shared: bool) -> float:
        """Return the most that a setting can gain on an example."""
        if not self.bounded:
            return float("inf")
        return 1.0 - self._score(number, self._record(FULL, number, shared, None, _Beginning(self, number)))

    def beginning(self, number: int) -> DynamicCache | None:
        """Return the beginning of an example's prompt, which is kept if there is room."""
        if number in self._begun:
            return self._begun[number]
        found = beginning(self.model, self.evaluation.batches[number].ids)
        size = 0 if found is None else held(found).nbytes
        if size <= self._room:
            self._room -= size
            self._begun[number] = found
        return found


class _Beginning:
    """The beginning of an example's prompt, read when it is first needed."""

    def __init__(self, trials: Trials, number: int) -> None:
        self._trials, self._number = trials, number
        self._found: list[DynamicCache | None] = []

    def __call__(self) -> DynamicCache | None:
        if not self._found:
            self._found.append(self._trials.beginning(self._number))
        return self._found[0]


def check_informative(score: float, bounded: bool, name: str) -> None:
    """Refuse a task on which the full cache gets nothing: nothing can be lost on it."""
    if bounded and score <= 0:
        raise TaskError(f"the full cache scores 0 on {name}, so that no setting can lose anything; choose another task")
