"""From single records to what a run found, with intervals, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from foveate.bench.methods import Contender
from foveate.bench.parts import intervals
from foveate.bench.policies import answers, losses, times
from foveate.bench.policies.desk import Desk, name

Record = dict[str, Any]


class Summary:
    """What the journal knows of one model's run, put together.

    Args:
        desk: the model, after it has worked.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk, self.full = desk, desk.contenders[0]
        self.asked = {task: answers.prompts(desk, task) for task in desk.plan.tasks}
        self.worth = {task: answers.is_worth(desk, task) for task in self.asked}
        self.texts = {tokens: losses.texts(desk, tokens) for tokens in desk.plan.losses}

    def model(self, called: str, seconds: dict[str, float]) -> Record:
        """One model's part of the result.

        Args:
            called: its name.
            seconds: how long each policy took to learn about it.
        """
        host, weights = self.desk.host, self.desk.model.dtype
        return {
            "name": called, "type": host.config.model_type,
            "layers": host.layers, "heads": host.heads, "kv_heads": host.kv_heads,
            "parameters": sum(p.numel() for p in self.desk.model.parameters()), "dtype": str(weights).split(".")[-1],
            "learnt_seconds": seconds,
            "tasks": {
                task: {"tokens": ids.shape[1], "prompts": len(ids), "counts": self.worth[task]}
                for task, (ids, _) in self.asked.items()
            },
            "texts": {"count": self.desk.plan.texts, "horizon": self.desk.plan.horizon},
            "rows": [self.row(contender) for contender in self.desk.contenders],
        }  # fmt: skip

    def row(self, contender: Contender) -> Record:
        """One policy at one budget; with the reason where it failed."""
        row: Record = {"method": contender.key, "title": contender.title, "budget": contender.budget}
        if reason := self.desk.errors.get(name(contender)):
            return {**row, "error": reason}
        said = {task: self._said(contender, task) for task in self.asked}
        every = [record for task, records in said.items() if self.worth[task] for record in records]
        scores = {task: score([record["score"] for record in records]) for task, records in said.items()}
        return {
            **row,
            "scores": {**scores, "all": score([record["score"] for record in every])},
            "kept": _mean([record["kept"] for record in every]),
            "read": _mean([record["read"] for record in every]),
            "losses": {str(tokens): self._loss(contender, tokens) for tokens in self.texts},
            "times": {str(tokens): self._times(contender, tokens) for tokens in self.desk.plan.times},
        }

    def _said(self, contender: Contender, task: str) -> list[Record]:
        ids, new = self.asked[task]
        found = [self.desk.known(contender, *answers.what(task, one, new)) for one in ids]
        return [record for record in found if record]

    def _losses(self, contender: Contender, tokens: int) -> list[float]:
        found = [self.desk.known(contender, *losses.what(*pair)) for pair in zip(*self.texts[tokens], strict=True)]
        return [loss for record in found if record for loss in record["losses"]]

    def _loss(self, contender: Contender, tokens: int) -> Record:
        """The mean loss, and how much more it is than the full cache's, token by token."""
        own, base = self._losses(contender, tokens), self._losses(self.full, tokens)
        found: Record = {"mean": _mean(own), "tokens": len(own)}
        if own and contender is not self.full and len(own) == len(base):
            more = tuple(a - b for a, b in zip(own, base, strict=True))
            found["more"] = fmean(more)
            found["low"], found["high"] = intervals.bootstrap(more)
        return found

    def _times(self, contender: Contender, tokens: int) -> Record:
        """Times as medians over rounds, and as ratios to the full cache's in the same round."""
        ids, new = self.desk.text(tokens), self.desk.plan.steps
        found: Record = {}
        for kind, count, more in (("read", times.READINGS, ()), ("decode", self.desk.plan.rounds, (new,))):
            own, base = (
                [self.desk.known(one, *times.what(kind, ids, number, *more)) for number in range(count)]
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
    """A mean score and its interval."""
    low, high = intervals.of_scores(scores) or (None, None)
    return {"mean": _mean(scores), "low": low, "high": high, "count": len(scores)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
