"""Scanpaths with fewer saccades: MultiMatch's simplification, by the rules of the authors' toolbox.

It depends on how you look at it: Scanpath comparison in multiple dimensions with MultiMatch (Dewhurst et al., 2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Saccades:
    """A scanpath as its saccades.

    Args:
        starts: `(S, 2)`, x and y of the fixation that each starts from.
        steps: `(S, 2)`, its vector.
        durations: seconds of the fixation before each, then of the last one; simplification may leave more entries.
    """

    starts: np.ndarray
    steps: np.ndarray
    durations: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def lengths(self) -> np.ndarray:
        return np.linalg.norm(self.steps, axis=1)

    def angles(self) -> np.ndarray:
        """Return directions in radians, -pi..pi."""
        return np.arctan2(self.steps[:, 1], self.steps[:, 0])

    def take(self, chosen: np.ndarray) -> Self:
        return replace(self, starts=self.starts[chosen], steps=self.steps[chosen], durations=self.durations[chosen])


def simplified(path: Saccades, amplitude: float, angle: float, duration: float) -> Saccades:
    """Join saccades by direction, then by length, until their number stays the same.

    Args:
        path: the saccades.
        amplitude: pixels; a shorter saccade is joined to the next, if the fixation on either side of it is short.
        angle: degrees; a saccade is joined to the next if the angle between them is less, and the fixation between
            them is short.
        duration: seconds; a shorter fixation is short.
    """
    count = len(path.durations)
    while True:
        path = _by_length(_by_direction(path, angle, duration), amplitude, duration)
        if len(path.durations) == count:
            return path
        count = len(path.durations)


class _Joined:
    """A scanpath in the making."""

    def __init__(self, path: Saccades) -> None:
        self.path = path
        self.starts: list[np.ndarray] = []
        self.steps: list[np.ndarray] = []
        self.durations: list[float] = []

    def add(self, first: int, count: int) -> None:
        """Add `count` neighbours as one saccade, with the start and the fixation of the first."""
        self.starts.append(self.path.starts[first])
        self.steps.append(self.path.steps[first : first + count].sum(0))
        self.durations.append(self.path.durations[first])

    def done(self) -> Saccades:
        durations = np.array([*self.durations, self.path.durations[-1]])
        return Saccades(np.array(self.starts).reshape(-1, 2), np.array(self.steps).reshape(-1, 2), durations)


def _by_direction(path: Saccades, angle: float, duration: float) -> Saccades:
    made, i = _Joined(path), 0
    while i < len(path):
        is_joined = i + 1 < len(path) and _degrees(*path.steps[i : i + 2]) < angle and path.durations[i + 1] < duration
        made.add(i, 2 if is_joined else 1)
        i += 2 if is_joined else 1
    return made.done()


def _by_length(path: Saccades, amplitude: float, duration: float) -> Saccades:
    made, i, lengths = _Joined(path), 0, path.lengths()
    while i < len(path):
        is_last = i + 1 == len(path)
        beside = path.durations[-2:] if is_last else path.durations[i : i + 2]
        is_small = lengths[i] < amplitude and bool((beside < duration).any())
        if is_small and is_last and made.steps:
            # the toolbox writes the last two saccades of its input over the last one that it has made, whatever that
            # was joined of, and keeps a duration too many
            made.steps[-1] = path.steps[-2:].sum(0)
            made.durations.append(path.durations[i - 1])
            i += 1
        else:
            is_joined = is_small and not is_last
            made.add(i, 2 if is_joined else 1)
            i += 2 if is_joined else 1
    return made.done()


def _degrees(one: np.ndarray, other: np.ndarray) -> float:
    """Return the angle between two saccades; NaN, which is under no threshold, if one has no length."""
    product = float(np.linalg.norm(one) * np.linalg.norm(other))
    if not product:
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, float(one @ other) / product))))
