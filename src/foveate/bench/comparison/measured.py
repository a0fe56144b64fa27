"""Measurements of `compare`: methods side by side, and their ratios to the baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from foveate.bench.comparison.rows import PAIRS, TIMES, Row
from foveate.bench.parts import intervals
from foveate.core.errors import OptionError

MEASURES = (
    "score", "agnostic_score", "answer_tokens", "cache_kept", "keys_read", "prefill_ms", "decode_ms", "memory_mb",
    "peak_mb",
)  # fmt: skip
_WIDE, _UNDECIDED = 2.0, 1.3  # the largest ratio of an interval's ends, in general and if 1 is inside


class Ratio(NamedTuple):
    """A measure divided by the baseline's, and for times the 95 % interval of the median over pairs."""

    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """True if the interval is narrow enough for a conclusion; 0.4 to 1.5 is neither faster nor slower."""
        undecided = self.low < 1 < self.high and self.high > _UNDECIDED * self.low
        return not undecided and self.high <= _WIDE * self.low


@dataclass(frozen=True)
class Measured:
    """Methods side by side in one run; a `Comparison` without what prints and saves it.

    Args:
        length: the length of the prompts; None if the task has no such setting.
        budgets: the shares of each prompt's cache that the methods may use, in ascending order.
        examples: how many prompts each method answered.
        versions: the versions of the packages, by name.
        baseline: the key of the method to which ratios refer.
        metric: the score, one of `foveate.tasks.base.scores.SCORES`, or "loss".
        batch: how many prompts ran together.
        digest: the digest of all inputs, such as the model's weights and the prompts.
    """

    model: str
    task: str
    seed: int
    device: str
    dtype: str
    budgets: list[float]
    examples: int
    length: int | None
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    baseline: str = "full"
    metric: str = "begins"
    batch: int = 1
    digest: str = ""

    def base(self) -> Row | None:
        """Return the baseline's row, or None before it is measured."""
        return next((row for row in self.rows if row.method == self.baseline), None)

    def at(self, budget: float) -> Self:
        """Return the part with one budget: its rows, and those of methods that take none, such as the baseline."""
        rows = [row for row in self.rows if row.id[1] in (None, budget)]
        return replace(self, budgets=[budget], rows=rows)

    def parts(self) -> list[Self]:
        """Return the parts of all budgets."""
        return [self.at(budget) for budget in self.budgets] if len(self.budgets) > 1 else [self]

    def ratio(self, row: Row, measure: str) -> float | None:
        """Return `row`'s `measure` over the baseline's; None if either is missing, or a time's ratio is uncertain."""
        found = self.paired(row, measure)
        return found.value if found is not None and found.is_certain else None

    def paired(self, row: Row, measure: str) -> Ratio | None:
        """Return `ratio` with its interval, of any width. Times are compared per prompt, other measures directly."""
        if measure not in MEASURES:
            raise OptionError(f'measure="{measure}" must be one of {", ".join(MEASURES)}')
        if measure in TIMES:
            pairs = [(getattr(answer, measure), getattr(answer, f"base_{measure}")) for answer in row.answers]
            ratios = [time / base for time, base in pairs if time > 0 and base > 0]
            return Ratio(*intervals.of_median(ratios)) if len(ratios) >= PAIRS else None
        base = self.base()
        if base is None:
            return None
        value, reference = getattr(row, measure), getattr(base, measure)
        if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
            return None
        return Ratio(*[value / reference] * 3)
