"""Run methods interleaved: every method answers a prompt before the next prompt starts.

Disturbances of the machine then affect all methods alike, since each prompt takes only a few seconds, and the baseline
is timed beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan
from typing import Any, Protocol

from transformers import DynamicCache, PreTrainedModel

from foveate.bench.comparison.agnostic import SharedContext, answer
from foveate.bench.comparison.evaluation import Evaluation
from foveate.bench.comparison.measure import Batch, BatchResult, memory_use, read_batch, run_batch
from foveate.bench.comparison.method_run import MethodRun, one_line
from foveate.bench.known import FULL
from foveate.bench.parts import digest
from foveate.bench.parts.cache_copy import can_copy
from foveate.bench.parts.journal import Journal
from foveate.core.errors import Interrupted


class Progress(Protocol):
    """A receiver of progress, which counts answers: `start` gets the number of those that are still to be made."""

    def start(self, total: int) -> None: ...
    def advance(self, label: str) -> None: ...
    def say(self, label: str) -> None: ...


class InterleavedRun:
    """Runs what the journal does not have, and records it prompt by prompt.

    Args:
        model: a decoder.
        environment: the digest of the model and of all else that is common to all answers.
        journal: holds known results, and receives new ones.
        progress: receives the progress.
    """

    def __init__(self, model: PreTrainedModel, environment: str, journal: Journal, progress: Progress) -> None:
        self.model, self.environment, self.journal, self.progress = model, environment, journal, progress

    def run(self, runs: Sequence[MethodRun], evaluation: Evaluation) -> None:
        """Complete the runs of all methods.

        Raises:
            Interrupted: with the number of known answers, and of all answers, query-agnostic ones included.
        """
        active = [run for run in runs if not run.given_up]
        asked = [run for run in active if run.contender.key != FULL]
        total = len(active) * len(evaluation.prompts) + len(asked) * len(evaluation.agnostic_indices)
        self._load_known(active, evaluation.batches)
        self._load_agnostic(asked, evaluation.contexts)
        self.progress.start(total - answered(active))
        try:
            for number, batch in enumerate(evaluation.batches):
                todo = [run for run in active if not all(index in run.records for index in batch.indices)]
                if todo:
                    self._run_round(_rotated(_with_baseline(todo, active), number), todo, batch, number, evaluation)
            for shared in evaluation.contexts:
                for run in asked:
                    self._ask(run, shared)
            for run in active:
                if run.records:
                    self.progress.say(f"{run.label}: memory")
                    run.megabytes = self._memory(run, evaluation.memory_batch)
        except KeyboardInterrupt:
            raise Interrupted(answered(active), total) from None

    def _load_known(self, runs: Sequence[MethodRun], batches: Sequence[Batch]) -> None:
        """Load the journal's answers."""
        for run in runs:
            for number, batch in enumerate(batches):
                for row, index in enumerate(batch.indices):
                    found = self.journal.get(self._key(run, batch, row))
                    if found is None and run.shares(number, batch):
                        found = self.journal.get(self._key(run, batch, row, "shared"))
                    if found is not None:
                        run.records[index] = found

    def _load_agnostic(self, runs: Sequence[MethodRun], contexts: Sequence[SharedContext]) -> None:
        """Load the journal's query-agnostic answers, of contexts whose questions are all answered."""
        for run in runs:
            for shared in contexts:
                keys = self._agnostic_keys(run, shared)
                found = [record for key in keys if (record := self.journal.get(key)) is not None]
                if len(found) == len(keys):
                    run.agnostic |= dict(zip(shared.indices, found, strict=True))

    def _ask(self, run: MethodRun, shared: SharedContext) -> None:
        """Answer the questions about one context, which the method compressed without knowing them."""
        if all(index in run.agnostic for index in shared.indices):
            return
        if not (run.agnostic_error or run.given_up):
            try:
                records = answer(self.model, run.contender.at(shared.ids.shape[1]), shared)
            except Exception as error:  # noqa: BLE001  the method keeps its other scores
                run.agnostic_error = one_line(error)
            else:
                self.journal.add(dict(zip(self._agnostic_keys(run, shared), records, strict=True)))
                run.agnostic |= dict(zip(shared.indices, records, strict=True))
        for _ in shared.indices:
            self.progress.advance(f"{run.label}, query-agnostic")

    def _agnostic_keys(self, run: MethodRun, shared: SharedContext) -> list[str]:
        count = len(shared.indices)
        return [digest.of(self.environment, run.contender.identity, shared.identity(at)) for at in range(count)]

    def _run_round(
        self, order: list[MethodRun], todo: list[MethodRun], batch: Batch, number: int, evaluation: Evaluation
    ) -> None:
        """Run one batch under every method, and record it after the last one."""
        results: dict[MethodRun, tuple[BatchResult, bool]] = {}
        shared = self._read(batch) if any(run.shares(number, batch) for run in todo) else None
        for run in order:
            own = shared is None or not run.shares(number, batch)
            found = self._attempt(run, batch, evaluation, None if own else shared)
            if found is not None:
                results[run] = found, own
            if run in todo:
                for _ in batch.indices:
                    self.progress.advance(run.label)
        base, new = next((found for run, (found, _) in results.items() if run.contender.key == FULL), None), {}
        for run in todo:
            if run in results:
                found, own = results[run]
                for row, index in enumerate(batch.indices):
                    run.records[index] = _record(found, base, row)
                    new[self._key(run, batch, row, *([] if own else ["shared"]))] = run.records[index]
        self.journal.add(new)

    def _read(self, batch: Batch) -> DynamicCache | None:
        """Read a batch for the methods that share it; None if that fails, or if the cache cannot be copied."""
        if batch.ids.shape[1] < 2:
            return None
        try:
            cache = read_batch(self.model, batch)
        except Exception:  # noqa: BLE001  each method reads the batch itself then, and fails with its own reason
            return None
        return cache if can_copy(cache) else None

    def _attempt(
        self, run: MethodRun, batch: Batch, evaluation: Evaluation, shared: DynamicCache | None = None
    ) -> BatchResult | None:
        """Run a method on a batch; None with a reason if it fails. A method that has no answer yet is given up."""
        reason = run.given_up or _refusal(run, batch)
        if not reason:
            try:
                run.warm_up(self.model, batch)
                return run_batch(
                    self.model, run.contender.at(batch.length), batch, shared=shared,
                    is_finished=lambda rows: evaluation.is_finished(batch, rows),
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001  a failed method becomes a row with its reason
                reason = one_line(error)
                run.given_up = "" if run.records else reason
        run.errors |= dict.fromkeys(batch.indices, reason)
        return None

    def _memory(self, run: MethodRun, batch: Batch) -> list[float]:
        """Measure a method's memory, on the same prompt for all."""
        key = digest.of(self.environment, run.contender.identity, batch.identity, "memory")
        known = self.journal.get(key)
        if known is not None:
            return [nan if value is None else value for value in known["megabytes"]]
        try:
            found = memory_use(self.model, run.contender.at(batch.length), batch)
        except Exception:  # noqa: BLE001  a method without a memory figure keeps its other figures
            found = [nan] * 3
        self.journal.add({key: {"megabytes": [_plain(value) for value in found]}})
        return found

    def _key(self, run: MethodRun, batch: Batch, row: int, *more: str) -> str:
        return digest.of(self.environment, run.contender.identity, batch.identity, row, *more)


def answered(runs: Sequence[MethodRun]) -> int:
    """Return the number of answers that the runs have, query-agnostic ones included."""
    return sum(len(run.records) + len(run.agnostic) for run in runs)


def _refusal(run: MethodRun, batch: Batch) -> str:
    """Return why the full cache cannot read this batch. Other methods may: many stream over any length."""
    prompt = batch.too_long
    if run.contender.key != FULL or prompt is None:
        return ""
    needed = f"{prompt.ids.shape[1]} + {prompt.new_tokens}"
    return f"the prompt and its answer take {needed} tokens; the model's context holds {prompt.context}"


def _with_baseline(todo: list[MethodRun], runs: Sequence[MethodRun]) -> list[MethodRun]:
    """Return the runs to do, and the full cache's beside them, for comparable times."""
    return todo + [run for run in runs if run.contender.key == FULL and run not in todo]


def _rotated(runs: list[MethodRun], by: int) -> list[MethodRun]:
    """Rotate the order, so that no method always starts with warm or cold caches."""
    cut = by % len(runs)
    return runs[cut:] + runs[:cut]


def _record(result: BatchResult, base: BatchResult | None, row: int) -> dict[str, Any]:
    return {
        "ids": result.ids[row],
        "loss": None if result.losses is None else _plain(result.losses[row]),
        "cache_kept": result.kept,
        "keys_read": result.read,
        "prefill_ms": _plain(result.prefill_ms),
        "decode_ms": _plain(result.decode_ms),
        "base_prefill_ms": None if base is None else _plain(base.prefill_ms),
        "base_decode_ms": None if base is None else _plain(base.decode_ms),
    }


def _plain(value: float) -> float | None:
    return value if isfinite(value) else None
