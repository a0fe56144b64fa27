"""ScanMatch: scanpaths as strings of the screen's regions, aligned.

ScanMatch: A novel method for comparing fixation sequences (Cristino, Mathot, Theeuwes and Gilchrist, 2010), Behavior
Research Methods 42, and its MATLAB toolbox.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown
from foveate.gaze.base.scanpath import Scanpath


def scanmatch(
    one: Scanpath, other: Scanpath, *, bins: tuple[int, int] = (12, 8), threshold: float = 3.5, gap: float = 0.0,
    seconds: float | None = None,
) -> float:  # fmt: skip
    """Return the ScanMatch score of two scanpaths on images of one size.

    Each fixation becomes the region that it lies in, of `bins` columns and rows. The two strings are aligned so that
    the sum of `substitution_matrix` over aligned regions, and of `gap` over the others, is largest. The score is that
    sum over `threshold * max(length, length)`, what the longer string would have with itself.

    Args:
        one, other: the scanpaths. A fixation outside the screen is taken to its border, as in the toolbox.
        bins: columns and rows of regions; the toolbox's by default.
        threshold: the distance, in regions, at which two regions have a score of 0. The paper suggests twice the
            standard deviation of saccades' amplitudes.
        gap: the score of a region without a partner; 0 or less.
        seconds: with durations: a fixation stands in the string once for each so many seconds, halves rounded up. None:
            once, whatever its duration.

    Returns:
        1 for equal strings; at least 0 with a gap of 0.

    Raises:
        ShapeError: images of two sizes, or an empty scanpath.
        OptionError: an option that is out of range, or `seconds` without durations.
    """
    if one.size != other.size:
        raise ShapeError(f"scanpaths must be on images of one size; got {one.size} and {other.size}")
    scores = substitution_matrix(bins, threshold)
    strings = [regions(each, bins, seconds) for each in (one, other)]
    if not all(len(each) for each in strings):
        lengths = ", ".join(str(len(each)) for each in strings)
        raise ShapeError(f"scanpaths must have at least one region each; got strings of {lengths}")
    best = align(scores[strings[0]][:, strings[1]], gap)
    return best / (threshold * max(map(len, strings)))


def regions(scanpath: Scanpath, bins: tuple[int, int] = (12, 8), seconds: float | None = None) -> Int[Tensor, " n"]:
    """Return a scanpath's string: numbers of regions, row by row from the top left."""
    _check_bins(bins)
    height, width = scanpath.size
    x, y = scanpath.fixations.double().unbind(1)
    columns = (x * bins[0] / width).floor().long().clamp(0, bins[0] - 1)
    rows = (y * bins[1] / height).floor().long().clamp(0, bins[1] - 1)
    found = rows * bins[0] + columns
    if seconds is None:
        return found
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise OptionError(f"seconds={shown(seconds)} must be over 0, or None")
    if scanpath.durations is None:
        raise OptionError("seconds needs the durations of fixations; take seconds=None")
    return found.repeat_interleave((scanpath.durations.double() / seconds + 0.5).floor().long())


def substitution_matrix(bins: tuple[int, int] = (12, 8), threshold: float = 3.5) -> Float[Tensor, "n n"]:
    """Return the score of each pair of regions: `threshold` less the distance of their centres, in regions."""
    _check_bins(bins)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < math.inf:
        raise OptionError(f"threshold={shown(threshold)} must be a finite number over 0")
    number = torch.arange(bins[0] * bins[1])
    places = torch.stack([number % bins[0], number // bins[0]], 1).double()
    return threshold - torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def align(scores: Float[Tensor, "n m"], gap: float) -> float:
    """Return the largest total of a global alignment (Needleman and Wunsch, 1970).

    Args:
        scores: the score of each element of one string with each of the other.
        gap: the score of an element without a partner; 0 or less.
    """
    if isinstance(gap, bool) or not isinstance(gap, int | float) or not -math.inf < gap <= 0:
        raise OptionError(f"gap={shown(gap)} must be a finite number of at most 0")
    table = scores.double().numpy()
    across = gap * np.arange(table.shape[1] + 1)
    best = across.copy()
    for row in table:
        reached = np.empty_like(best)
        reached[0] = best[0] + gap
        reached[1:] = np.maximum(best[:-1] + row, best[1:] + gap)
        # an element of the second string may be left out after any of these: a running maximum, gaps taken off
        best = np.maximum.accumulate(reached - across) + across
    return float(best[-1])


def _check_bins(bins: object) -> None:
    if not isinstance(bins, tuple) or len(bins) != 2 or not all(type(each) is int and each > 0 for each in bins):
        raise OptionError(f"bins={shown(bins)} must be (columns, rows), two whole numbers over 0")
