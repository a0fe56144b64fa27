"""MultiMatch: scanpaths as sequences of saccades, aligned, and compared in five respects.

A vector-based, multidimensional scanpath similarity measure (Jarodzka, Holmqvist and Nystroem, 2010), and It depends
on how you look at it: Scanpath comparison in multiple dimensions with MultiMatch (Dewhurst et al., 2012), Behavior
Research Methods 44. Details follow the authors' toolbox, as `multimatch-gaze` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.gaze.base.scanpath import Scanpath
from foveate.gaze.measures.simplified import Saccades, simplified

_LEAST = 3  # fixations, as in the toolbox


class MultiMatch(NamedTuple):
    """Five similarities of two scanpaths: 1 for equal ones, at least 0 within the image.

    Each is 1 less the median, over aligned pairs of saccades, of a difference.

    Attributes:
        shape: of the vectors, over twice the image's diagonal.
        direction: of the angles, over pi.
        length: of the lengths, over the diagonal.
        position: of the places where saccades start, over the diagonal.
        duration: of the fixations before the saccades, over the longer of the two; NaN without durations.
    """

    shape: float
    direction: float
    length: float
    position: float
    duration: float


@dataclass(frozen=True)
class Simplify:
    """Thresholds below which neighbouring saccades are joined.

    Args:
        amplitude: pixels; a shorter saccade may be joined to the next.
        angle: degrees; two saccades with less between them may be joined.
        duration: seconds; the fixation beside them has to be shorter.
    """

    amplitude: float
    angle: float
    duration: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            validate.at_least(name, value, 0)


def multimatch(one: Scanpath, other: Scanpath, *, simplify: Simplify | None = None) -> MultiMatch:
    """Compare two scanpaths on images of one size.

    Saccades of the two are aligned along the path through the matrix of their vectors' distances, from the first pair
    to the last by steps right, down or both, on which the sum of distances is least (Dijkstra).

    Args:
        one, other: the scanpaths. Either one with fewer than 3 fixations gives NaN for all five, as in the toolbox.
        simplify: join small saccades first; needs durations. None leaves the scanpaths as they are.

    Raises:
        ShapeError: images of two sizes.
        OptionError: `simplify` without durations, or scipy is not installed.
    """
    if one.size != other.size:
        raise ShapeError(f"scanpaths must be on images of one size; got {one.size} and {other.size}")
    if simplify is not None and (one.durations is None or other.durations is None):
        raise OptionError("simplify needs the durations of fixations; take simplify=None")
    if min(len(one), len(other)) < _LEAST:
        return MultiMatch(*[math.nan] * 5)
    first, second = (_saccades(each, simplify) for each in (one, other))
    rows, columns = shortest_path(_distances(first.steps, second.steps))
    return _similarities(first.take(rows), second.take(columns), math.hypot(*one.size))


def shortest_path(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the cheapest path from a matrix's first entry to its last.

    A step goes right, down, or right and down, and costs the entry that it arrives at.
    """
    sparse, dijkstra = _scipy()
    number = np.arange(costs.size).reshape(costs.shape)
    last_row, last_column = costs.shape[0] - 1, costs.shape[1] - 1
    edges = [
        (number[:, :-1], number[:, 1:], costs[:, 1:]),
        (number[:-1], number[1:], costs[1:]),
        (number[:-1, :-1], number[1:, 1:], costs[1:, 1:]),
    ]
    start, end, cost = (np.concatenate([each[place].ravel() for each in edges]) for place in range(3))
    graph = sparse.coo_matrix((cost, (start, end)), shape=(costs.size, costs.size)).tocsr()
    _, before = dijkstra(graph, directed=True, indices=0, return_predecessors=True)
    path = [last_row * costs.shape[1] + last_column]
    while path[-1]:
        path.append(int(before[path[-1]]))
    rows, columns = np.unravel_index(path[::-1], costs.shape)
    return rows, columns


def _saccades(scanpath: Scanpath, simplify: Simplify | None) -> Saccades:
    xy = scanpath.fixations.double().numpy()
    durations = np.full(len(xy), math.nan) if scanpath.durations is None else scanpath.durations.double().numpy()
    whole = Saccades(xy[:-1], np.diff(xy, axis=0), durations)
    return whole if simplify is None else simplified(whole, simplify.amplitude, simplify.angle, simplify.duration)


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.linalg.norm(one[:, None] - other, axis=-1)


def _similarities(one: Saccades, other: Saccades, diagonal: float) -> MultiMatch:
    """Compare saccades pair by pair."""
    angles = np.abs(one.angles() - other.angles())
    longer = np.maximum(one.durations, other.durations)
    differences = {
        "shape": np.linalg.norm(one.steps - other.steps, axis=1) / (2 * diagonal),
        "direction": np.minimum(angles, 2 * math.pi - angles) / math.pi,
        "length": np.abs(one.lengths() - other.lengths()) / diagonal,
        "position": np.linalg.norm(one.starts - other.starts, axis=1) / diagonal,
        "duration": np.abs(one.durations - other.durations) / np.where(longer == 0, 1, longer),
    }
    return MultiMatch(**{name: 1 - float(np.median(each)) for name, each in differences.items()})


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import sparse
        from scipy.sparse.csgraph import dijkstra
    except ImportError:
        raise OptionError("MultiMatch needs scipy: pip install 'foveate[gaze]'") from None
    return sparse, dijkstra
