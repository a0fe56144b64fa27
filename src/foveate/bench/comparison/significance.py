"""Paired tests of each method's score beside the full cache's, and beside the best other method's at its budget.

All pairs of methods at a budget are tested on the same examples, and so is each method with the full cache. Holm's
correction covers all of these tests, at all budgets of a run. The best other method is chosen by its score; since all
pairs are in the correction, that choice does not make a difference look surer than it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from foveate.bench.comparison.results import Comparison
from foveate.bench.comparison.rows import Row
from foveate.bench.parts import paired_tests
from foveate.bench.parts.paired_tests import Test
from foveate.tasks.base.scores import LOSS

LEVEL = 0.05


@dataclass(frozen=True)
class Contrast:
    """A row's score beside another row's on the same examples.

    Args:
        row, other: the rows.
        examples: how many examples both have a score for.
        test: the test's result, where a positive difference means that `row` is better, also for losses.
        adjusted: its p-value after Holm's correction.
    """

    row: Row
    other: Row
    examples: int
    test: Test
    adjusted: float

    @property
    def is_shown(self) -> bool:
        """Return whether the rows differ by more than chance explains, after the correction."""
        return self.adjusted < LEVEL

    def reversed(self) -> Contrast:
        """Return the same contrast from the other row's side."""
        low, high = self.test.interval
        test = self.test._replace(difference=-self.test.difference, interval=(-high, -low))
        return Contrast(self.other, self.row, self.examples, test, self.adjusted)


@dataclass(frozen=True)
class Findings:
    """All contrasts of a comparison.

    Args:
        metric: the score.
        contrasts: each pair of rows that was tested, once.
    """

    metric: str
    contrasts: tuple[Contrast, ...]

    @property
    def test(self) -> str:
        """The names of the tests, joined by "or"."""
        return " or ".join(sorted({contrast.test.name for contrast in self.contrasts}))

    def of(self, row: Row, other: Row) -> Contrast | None:
        """Return the contrast of two rows; None if they were not tested."""
        for contrast in self.contrasts:
            if contrast.row is row and contrast.other is other:
                return contrast
            if contrast.row is other and contrast.other is row:
                return contrast.reversed()
        return None

    def with_best(self, row: Row, part: Comparison) -> Contrast | None:
        """Return the contrast with the best other method of one budget; None if there is none."""
        others = [other for other in part.rows if other is not row and other.method != part.baseline]
        found = [contrast for other in others if (contrast := self.of(row, other)) is not None]
        return max(found, key=lambda contrast: goodness(contrast.other, self.metric), default=None)


def findings(comparison: Comparison) -> Findings:
    """Test all pairs of methods at each budget, and each method with the full cache."""
    pairs: dict[tuple[int, int], tuple[Row, Row]] = {}
    for part in comparison.parts():
        rows = sorted((row for row in part.rows if row.answers), key=lambda row: row.method == part.baseline)
        for row, other in combinations(rows, 2):
            pairs.setdefault((id(row), id(other)), (row, other))
    tested = [(row, other, scores) for row, other in pairs.values() if (scores := _scores(row, other))]
    tests = [_test(scores, comparison.metric) for _, _, scores in tested]
    adjusted = paired_tests.holm([test.p for test in tests])
    found = zip(tested, tests, adjusted, strict=True)
    return Findings(comparison.metric, tuple(Contrast(a, b, len(s), test, p) for (a, b, s), test, p in found))


def _test(scores: Sequence[tuple[float, float]], metric: str) -> Test:
    sign = -1.0 if metric == LOSS else 1.0
    first, second = zip(*scores, strict=True)
    if sign > 0:
        return paired_tests.paired(first, second)
    return paired_tests.paired([sign * value for value in first], [sign * value for value in second])


def _scores(row: Row, other: Row) -> list[tuple[float, float]]:
    """Return the pairs of scores; examples that the second row, often the full cache, could not read are left out."""
    if len(row.answers) != len(other.answers):
        return []
    pairs = zip(row.answers, other.answers, strict=True)
    return [(a.score, b.score) for a, b in pairs if math.isfinite(a.score) and math.isfinite(b.score) and not b.error]


def goodness(row: Row, metric: str) -> float:
    """Return a row's score, or its negative loss."""
    if not math.isfinite(row.score):
        return -math.inf
    return -row.score if metric == LOSS else row.score
