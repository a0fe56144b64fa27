"""A one-sided bound of what is lost on average, from the losses on a sample of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95


def upper(losses: Sequence[float], level: float = LEVEL, bounded: bool = True) -> float:
    """Return a bound that the mean loss of all examples exceeds with a chance of at most `1 - level`.

    Args:
        losses: the full cache's score minus the setting's, for each example, drawn independently.
        level: the confidence.
        bounded: True for scores in 0..1. Gains then count as no loss, and the bound holds for any sample size: the
            exact binomial one (Clopper and Pearson) if each loss is 0 or 1, else Hoeffding's (1963, theorem 1), which
            is the same where nothing is lost. False for next-token losses, which have no limit: Student's t, which
            holds for means of many examples only.
    """
    if not bounded:
        return _student(losses, level)
    lost = [min(1.0, max(0.0, loss)) for loss in losses]
    if all(loss in (0.0, 1.0) for loss in lost):
        return _binomial(round(sum(lost)), len(lost), level)
    return _hoeffding(fmean(lost), len(lost), level)


def needed(most: float, level: float = LEVEL) -> int:
    """Return the number of examples with which a mean loss of at most `most` can be shown, if nothing is lost."""
    return math.ceil(math.log(1 - level) / math.log(1 - most)) if most < 1 else 1


def _binomial(count: int, of: int, level: float) -> float:
    """Return the largest chance with which `count` or fewer of `of` happen at least as often as `1 - level`."""
    if count >= of:
        return 1.0

    def at_most(p: float) -> float:
        return sum(math.comb(of, k) * p**k * (1 - p) ** (of - k) for k in range(count + 1))

    return _bisected(lambda p: at_most(p) > 1 - level, count / of)


def _hoeffding(mean: float, count: int, level: float) -> float:
    """Return the largest mean whose distance from the sample's is not excluded."""
    limit = math.log(1 / (1 - level)) / count

    def distance(p: float) -> float:
        first = mean * math.log(mean / p) if mean > 0 else 0.0
        return first + (1 - mean) * math.log((1 - mean) / (1 - p)) if mean < 1 else first

    return _bisected(lambda p: distance(p) < limit, mean)


def _bisected(holds: object, low: float) -> float:
    """Return the largest number in `low..1` that holds, up to rounding, from above."""
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 1 and holds(middle) else (low, middle)  # type: ignore[operator]
    return high


def _student(losses: Sequence[float], level: float) -> float:
    if len(losses) < 2:
        return math.inf
    return fmean(losses) + _t(level, len(losses) - 1) * stdev(losses) / math.sqrt(len(losses))


def _t(level: float, degrees: int) -> float:
    """Return the quantile of Student's t, by the expansion around the normal one; exact to 1 % from 4 degrees on."""
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )  # fmt: skip
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
