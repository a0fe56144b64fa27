"""Tests of whether two methods differ on the same examples, and the interval of the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import NamedTuple

from foveate.bench.parts import intervals
from foveate.bench.parts.intervals import Interval

MCNEMAR, PERMUTATION = "McNemar's exact test", "a paired permutation test"
_EXACT = 12  # up to so many differences every change of signs is tried
_DRAWS = 20_000


class Test(NamedTuple):
    """The result of a test.

    Args:
        name: the test.
        difference: the mean of the first's scores minus that of the second's.
        interval: its 95 % interval, without a correction for many tests.
        p: the chance of a difference at least as large if the two were exchangeable on every example.
    """

    name: str
    difference: float
    interval: Interval
    p: float


def paired(first: Sequence[float], second: Sequence[float]) -> Test:
    """Compare scores of the same examples.

    Scores that are all 0 or 1 take McNemar's exact test, which is the sign test on the examples that one solves and the
    other does not, and Newcombe's interval, which is not empty when nothing differs. Other scores take a permutation
    test, which changes signs of the differences, and the percentile bootstrap over examples.
    """
    differences = tuple(a - b for a, b in zip(first, second, strict=True))
    if {*first, *second} <= {0.0, 1.0}:
        wins, losses = differences.count(1.0), differences.count(-1.0)
        return Test(MCNEMAR, fmean(differences), _newcombe(first, second), _sign_test(wins, losses))
    interval = intervals.bootstrap(differences) if len(differences) > 1 else (differences[0], differences[0])
    return Test(PERMUTATION, fmean(differences), interval, _permutation(differences))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction: the chance of any false finding among all of them stays under each."""
    found, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = highest
    return found


def fewest(tests: int, level: float = 0.05) -> int:
    """Return the fewest examples with which one of so many corrected tests could find a difference."""
    return math.ceil(math.log2(2 * tests / level))


def _sign_test(wins: int, losses: int) -> float:
    """Return the two-sided chance of such a split of the examples that differ."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1)) * 0.5**count
    return min(1.0, 2 * tail)


def _permutation(differences: Sequence[float]) -> float:
    """Return the two-sided chance of the mean difference if the sign of each were drawn at random."""
    known = [value for value in differences if value]
    observed = abs(math.fsum(known)) * (1 - 1e-9)  # equal sums may differ in their last bits
    if len(known) <= _EXACT:
        sums = [abs(math.fsum(map(math.prod, zip(signs, known, strict=True)))) for signs in _signs(len(known))]
        return sum(value >= observed for value in sums) / len(sums)
    import torch  # the sums of many draws are slow in Python

    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_DRAWS, len(known)), generator=draw, dtype=torch.float64) * 2 - 1
    extreme = int(((signs @ torch.tensor(known, dtype=torch.float64)).abs() >= observed).sum())
    return (extreme + 1) / (_DRAWS + 1)


def _signs(count: int) -> list[tuple[int, ...]]:
    return list(product((1, -1), repeat=count))


def _newcombe(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return Newcombe's interval of a difference of paired proportions (1998, his method 10)."""
    count, p, q = len(first), fmean(first), fmean(second)
    both = sum(a * b for a, b in zip(first, second, strict=True))
    only_first, only_second = count * p - both, count * q - both
    neither = count - both - only_first - only_second
    spread = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    excess = both * neither - only_first * only_second
    excess = max(excess - count / 2, 0.0) if excess > 0 else excess
    relation = excess / math.sqrt(spread) if spread > 0 else 0.0
    (low, high), (least, most) = intervals.wilson(count * p, count), intervals.wilson(count * q, count)

    def width(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * relation * a * b + b * b))

    return p - q - width(p - low, most - q), p - q + width(high - p, q - least)
