"""Quantiles of Student's t distribution, for intervals of means of a few texts."""

from __future__ import annotations

import math
from statistics import NormalDist

from foveate.core import validate


def t_quantile(p: float, freedom: int) -> float:
    """Return the quantile of Student's t: exact for 1 and 2 degrees of freedom, and within 0.5 % from 3 on.

    The expansion around the normal quantile is 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical Functions. The
    error is that of the 97.5 % quantile, and falls with the degrees of freedom.
    """
    validate.count("freedom", freedom, 1)
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
