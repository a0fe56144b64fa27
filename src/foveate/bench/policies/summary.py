"""Summarise the records of a run, with intervals, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from foveate.bench.methods import Contender
from foveate.bench.parts import intervals
from foveate.bench.policies import answers, losses, times
from foveate.bench.policies.model_run import ModelRun, contender_name

Record = dict[str, Any]


class Summary:
    """The summary of one model's records.

    Args:
        run: the model's run, after all measurements.
    """

    def __init__(self, run: ModelRun) -> None:
        self.run, self.full = run, run.contenders[0]
        self.prompts = {task: answers.prompts(run, task) for task in run.plan.tasks}
        self.informative = {task: answers.is_informative(run, task) for task in self.prompts}
        self.texts = {tokens: losses.texts(run, tokens) for tokens in run.plan.losses}

    def model(self, name: str, seconds: dict[str, float]) -> Record:
        """Return one model's part of the result.

        Args:
            name: the model's name.
            seconds: the time of each policy's calibration.
        """
        host, weights = self.run.host, self.run.model.dtype
        return {
            "name": name, "type": host.config.model_type,
            "layers": host.layers, "heads": host.heads, "kv_heads": host.kv_heads,
            "parameters": sum(p.numel() for p in self.run.model.parameters()), "dtype": str(weights).split(".")[-1],
            "learnt_seconds": seconds,
            "tasks": {
                task: {"tokens": ids.shape[1], "prompts": len(ids), "counts": self.informative[task]}
                for task, (ids, _) in self.prompts.items()
            },
            "texts": {"count": self.run.plan.texts, "horizon": self.run.plan.horizon},
            "rows": [self.row(contender) for contender in self.run.contenders],
        }  # fmt: skip

    def row(self, contender: Contender) -> Record:
        """Return the row of one policy at one budget, with the reason if it failed."""
        row: Record = {"method": contender.key, "title": contender.title, "budget": contender.budget}
        if reason := self.run.errors.get(contender_name(contender)):
            return {**row, "error": reason}
        by_task = {task: self._answers(contender, task) for task in self.prompts}
        every = [record for task, records in by_task.items() if self.informative[task] for record in records]
        scores = {task: score([record["score"] for record in records]) for task, records in by_task.items()}
        return {
            **row,
            "scores": {**scores, "all": score([record["score"] for record in every])},
            "kept": _mean([record["kept"] for record in every]),
            "read": _mean([record["read"] for record in every]),
            "losses": {str(tokens): self._loss(contender, tokens) for tokens in self.texts},
            "times": {str(tokens): self._times(contender, tokens) for tokens in self.run.plan.times},
        }

    def _answers(self, contender: Contender, task: str) -> list[Record]:
        ids, new = self.prompts[task]
        found = [self.run.known(contender, *answers.answer_key(task, one, new)) for one in ids]
        return [record for record in found if record]

    def _losses(self, contender: Contender, tokens: int) -> list[float]:
        found = [self.run.known(contender, *losses.loss_key(*pair)) for pair in zip(*self.texts[tokens], strict=True)]
        return [loss for record in found if record for loss in record["losses"]]

    def _loss(self, contender: Contender, tokens: int) -> Record:
        """Return the mean loss, and its increase over the full cache's, compared per token."""
        own, base = self._losses(contender, tokens), self._losses(self.full, tokens)
        found: Record = {"mean": _mean(own), "tokens": len(own)}
        if own and contender is not self.full and len(own) == len(base):
            more = tuple(a - b for a, b in zip(own, base, strict=True))
            found["more"] = fmean(more)
            found["low"], found["high"] = intervals.bootstrap(more)
        return found

    def _times(self, contender: Contender, tokens: int) -> Record:
        """Return times as medians over rounds, and as ratios to the full cache's in the same round."""
        ids, new = self.run.text(tokens), self.run.plan.steps
        found: Record = {}
        for kind, count, more in (("read", times.PREFILL_ROUNDS, ()), ("decode", self.run.plan.rounds, (new,))):
            own, base = (
                [self.run.known(one, *times.time_key(kind, ids, number, *more)) for number in range(count)]
                for one in (contender, self.full)
            )
            pairs = [(median(a["ms"]), median(b["ms"])) for a, b in zip(own, base, strict=True) if a and b]
            if pairs:
                found[f"{kind}_ms"] = median(a for a, _ in pairs)
                found[f"{kind}_ratio"] = intervals.of_median([a / b for a, b in pairs])
            if own[0]:
                found[f"{kind}_live_mb"], found[f"{kind}_cache_mb"] = own[0]["live"] / 1e6, own[0]["bytes"] / 1e6
        return found


def score(scores: Sequence[float]) -> Record:
    """Return a mean score and its interval."""
    low, high = intervals.of_scores(scores) or (None, None)
    return {"mean": _mean(scores), "low": low, "high": high, "count": len(scores)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
