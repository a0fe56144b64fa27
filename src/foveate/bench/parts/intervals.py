"""Confidence intervals for scores and for ratios of times, in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, median

LEVEL = 0.95
_RESAMPLES = 1000
Interval = tuple[float, float]


def of_scores(scores: Sequence[float]) -> Interval | None:
    """Return a 95 % interval of the mean score: Wilson's if all scores are 0 or 1, else a bootstrap.

    None without a score, or with a single one that is neither 0 nor 1.
    """
    known = tuple(score for score in scores if math.isfinite(score))
    if known and set(known) <= {0.0, 1.0}:
        return wilson(sum(known), len(known))
    return bootstrap(known) if len(known) > 1 else None


def wilson(hits: float, count: int) -> Interval:
    """Return Wilson's interval of a proportion; it stays in 0..1, and is not empty if all or none are hits."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if hits == 0 else low), (1.0 if hits == count else high)


@lru_cache(maxsize=256)
def bootstrap(values: tuple[float, ...]) -> Interval:
    """Return the percentile bootstrap of the mean; equal values give equal intervals."""
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = round((1 - LEVEL) / 2 * _RESAMPLES)
    return means[cut], means[-1 - cut]


def of_median(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its distribution-free 95 % interval, whose ends are two of the values.

    With fewer than six values even the smallest and largest do not reach 95 %; they are returned then.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.5**count, 0  # the chance of at most `rank` values under the median
    while rank + 1 < count - 1 - rank:
        more = outside + math.comb(count, rank + 1) * 0.5**count
        if more > (1 - LEVEL) / 2:
            break
        outside, rank = more, rank + 1
    return median(ordered), ordered[rank], ordered[count - 1 - rank]
