"""Scanpaths, ScanMatch and MultiMatch: values by hand, other ways to compute them, and refusals."""

from __future__ import annotations

import itertools
import math
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.gaze import (
    Fixations,
    MultiMatch,
    Scanpath,
    Simplify,
    align,
    multimatch,
    regions,
    scanmatch,
    substitution_matrix,
)
from foveate.gaze.measures.multimatch import shortest_path
from foveate.gaze.measures.simplified import Saccades, simplified

SIZE = (300, 400)


def path(*xy: tuple[float, float], durations: list[float] | None = None, size: tuple[int, int] = SIZE) -> Scanpath:
    seconds = None if durations is None else torch.tensor(durations, dtype=torch.float64)
    return Scanpath(torch.tensor(xy, dtype=torch.float64), size, seconds)


def drawn(count: int, seed: int) -> Scanpath:
    random = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, 2, generator=random, dtype=torch.float64) * torch.tensor([400.0, 300.0])
    return Scanpath(xy, SIZE, 0.1 + 0.4 * torch.rand(count, generator=random, dtype=torch.float64))


# -- scanpaths ---------------------------------------------------------------------------------------------------------


def test_degrees_are_from_the_centre() -> None:
    found = Scanpath(torch.tensor([[200.0, 150.0], [260.0, 120.0]]), SIZE, px_per_deg=30.0, subject="ann")
    assert found.degrees().tolist() == [[0, 0], [2, -1]]
    back = Scanpath.from_degrees(found.degrees(), SIZE, 30.0, subject="ann")
    assert torch.equal(back.fixations, found.fixations) and back.subject == "ann" and len(back) == 2
    assert found.saccades().tolist() == [[60, -30]]
    assert found.is_inside() and not path((400, 10)).is_inside() and not path((3, -1)).is_inside()


def test_refused_scanpaths() -> None:
    xy = torch.zeros(3, 2)
    for given, error, says in (
        (dict(fixations=xy[:, :1], size=SIZE), ShapeError, "fixations must be positions"),
        (dict(fixations=xy / 0, size=SIZE), OptionError, "fixations must be finite"),
        (dict(fixations=xy, size=(3, 0)), ShapeError, "must be .H, W., two whole numbers"),
        (dict(fixations=xy, size=SIZE, durations=torch.ones(2)), ShapeError, r"durations must be \(3,\)"),
        (dict(fixations=xy, size=SIZE, durations=-torch.ones(3)), OptionError, "seconds of at least 0"),
        (dict(fixations=xy, size=SIZE, px_per_deg=0.0), OptionError, "px_per_deg=0.0 must be over 0"),
    ):
        with pytest.raises(error, match=says):
            Scanpath(**given)
    with pytest.raises(OptionError, match="degrees need px_per_deg"):
        Scanpath(xy, SIZE).degrees()


def test_scanpaths_join_to_fixations() -> None:
    found = Fixations.of_scanpaths([path((1, 2), (3, 4)), path((5, 6), size=(10, 10)), path((7, 8))], [0, 2, 0])
    assert found.image.tolist() == [0, 0, 2, 0] and len(found) == 4
    assert found.size(0) == SIZE and found.size(2) == (10, 10)
    assert found.of(0).tolist() == [[1, 2], [3, 4], [7, 8]]
    with pytest.raises(OptionError, match="scanpaths on image 0 must agree on its size"):
        Fixations.of_scanpaths([path((1, 2)), path((1, 2), size=(10, 10))], [0, 0])
    with pytest.raises(ShapeError, match="an index for each of the 1 scanpaths"):
        Fixations.of_scanpaths([path((1, 2))], [0, 1])


# -- ScanMatch ---------------------------------------------------------------------------------------------------------


def test_regions_go_row_by_row() -> None:
    found = path((0, 0), (399, 0), (133.4, 150), (500, -20), durations=[0.25, 0.1, 0.04, 0.05])
    assert regions(found, (3, 2)).tolist() == [0, 2, 4, 2]
    assert regions(found, (3, 2), seconds=0.1).tolist() == [0, 0, 0, 2, 2]


def test_the_substitution_matrix_by_hand() -> None:
    found = substitution_matrix((3, 2), 2.0)
    assert found.shape == (6, 6) and torch.equal(found, found.T)
    assert found[0].tolist() == pytest.approx([2, 1, 0, 1, 2 - math.sqrt(2), 2 - math.sqrt(5)])


@pytest.mark.parametrize(
    ("one", "other", "gap", "expected"),
    [
        (((10, 10), (390, 290)), ((10, 10), (390, 290)), 0.0, 1.0),
        (((10, 10), (390, 290)), ((390, 290), (10, 10)), 0.0, 0.5),  # one of the two pairs
        (((10, 10),), ((390, 290),), 0.0, 0.0),  # they lie sqrt(2) apart: better left out
        (((10, 10),), ((390, 290),), -0.1, -0.2),  # two gaps
        (((10, 10),), ((390, 290),), -1.0, 1 - math.sqrt(2)),  # cheaper than two gaps
        (((10, 10),), ((10, 10), (390, 10)), -0.1, 0.45),  # over the longer string
    ],
)
def test_scores_by_hand(one: tuple, other: tuple, gap: float, expected: float) -> None:
    for first, second in ((one, other), (other, one)):
        assert scanmatch(path(*first), path(*second), bins=(2, 2), threshold=1.0, gap=gap) == pytest.approx(expected)


def test_durations_lengthen_the_strings() -> None:
    one, other = path((10, 10), durations=[0.3]), path((10, 10), durations=[0.1])
    assert scanmatch(one, other, seconds=0.1) == pytest.approx(1 / 3)
    assert scanmatch(one, other) == 1.0


@pytest.mark.parametrize("gap", [0.0, -0.3, -5.0])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 6), (7, 3), (1, 5)])
def test_alignments_by_recursion(gap: float, sizes: tuple[int, int]) -> None:
    scores = torch.randn(sizes, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    @cache
    def best(i: int, j: int) -> float:
        if not i or not j:
            return gap * (i + j)
        return max(best(i - 1, j - 1) + float(scores[i - 1, j - 1]), best(i - 1, j) + gap, best(i, j - 1) + gap)

    assert align(scores, gap) == pytest.approx(best(*sizes))


def test_refused_calls_of_scanmatch() -> None:
    one = path((10, 10), (20, 20))
    for options, error, says in (
        (dict(bins=(0, 2)), OptionError, "bins=.0, 2. must be .columns, rows."),
        (dict(threshold=0), OptionError, "threshold=0 must be a finite number over 0"),
        (dict(gap=0.5), OptionError, "gap=0.5 must be a finite number of at most 0"),
        (dict(seconds=0.1), OptionError, "seconds needs the durations"),
        (dict(seconds=0.0), OptionError, "seconds=0.0 must be over 0"),
    ):
        with pytest.raises(error, match=says):
            scanmatch(one, one, **options)
    with pytest.raises(ShapeError, match="images of one size"):
        scanmatch(one, path((1, 1), size=(10, 10)))
    with pytest.raises(ShapeError, match="at least one region each; got strings of 2, 0"):
        scanmatch(one, Scanpath(torch.zeros(0, 2), SIZE))


# -- MultiMatch --------------------------------------------------------------------------------------------------------


def test_similarities_by_hand() -> None:
    """Saccades (100, 0), (0, 100) and (100, 0), (0, 200); the diagonal is 500."""
    one = path((0, 0), (100, 0), (100, 100), durations=[0.2, 0.4, 0.1])
    other = path((0, 0), (100, 0), (100, 200), durations=[0.1, 0.4, 0.3])
    expected = MultiMatch(shape=1 - 0.05, direction=1.0, length=1 - 0.1, position=1.0, duration=1 - 0.25)
    assert multimatch(one, other) == pytest.approx(expected)


def test_directions_go_round() -> None:
    """Saccades a little up and a little down to the left are nearly parallel, though their angles are not."""
    one = path((200, 100), (100, 101), (0, 102), durations=[1, 1, 1])
    other = path((200, 100), (100, 99), (0, 98), durations=[1, 1, 1])
    assert multimatch(one, other).direction == pytest.approx(1 - 2 * math.atan(0.01) / math.pi)


def test_equal_scanpaths_have_1_and_moved_ones_another_position() -> None:
    one = drawn(8, 0)
    assert multimatch(one, one) == pytest.approx((1.0,) * 5)
    moved = Scanpath(one.fixations + torch.tensor([30.0, 40.0]), SIZE, one.durations)
    assert multimatch(one, moved) == pytest.approx((1, 1, 1, 1 - 50 / 500, 1))


def test_it_is_symmetric() -> None:
    for seed in range(5):
        one, other = drawn(6, seed), drawn(9, seed + 10)
        assert multimatch(one, other) == pytest.approx(multimatch(other, one))


def test_unknown_durations_and_short_scanpaths() -> None:
    bare = Scanpath(drawn(4, 0).fixations, SIZE)
    found = multimatch(bare, drawn(5, 1))
    assert math.isnan(found.duration) and not any(math.isnan(each) for each in found[:4])
    assert all(math.isnan(each) for each in multimatch(path((1, 1), (2, 2)), drawn(5, 1)))
    instant = path((0, 0), (9, 0), (9, 9), durations=[0, 0, 0])
    assert multimatch(instant, instant).duration == 1


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (6, 4), (2, 1), (1, 4)])
def test_the_shortest_path_by_trying_all(sizes: tuple[int, int]) -> None:
    costs = np.random.default_rng(0).random(sizes)
    rows, columns = shortest_path(costs)
    assert (rows[0], columns[0]) == (0, 0) and (rows[-1], columns[-1]) == (sizes[0] - 1, sizes[1] - 1)
    steps = set(zip(np.diff(rows), np.diff(columns), strict=True))
    assert steps <= {(0, 1), (1, 0), (1, 1)}

    @cache
    def least(i: int, j: int) -> float:
        if (i, j) == (0, 0):
            return 0.0
        before = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
        return costs[i, j] + min(least(*each) for each in before if min(each) >= 0)

    assert costs[rows[1:], columns[1:]].sum() == pytest.approx(least(sizes[0] - 1, sizes[1] - 1))


def saccades(found: Scanpath) -> Saccades:
    xy = found.fixations.numpy()
    assert found.durations is not None
    return Saccades(xy[:-1], np.diff(xy, axis=0), found.durations.numpy())


def test_a_small_saccade_is_joined_to_the_next() -> None:
    short = saccades(path((0, 0), (10, 0), (60, 80), (60, 180), durations=[0.2, 0.05, 0.3, 0.4]))
    found = simplified(short, 20, 0, 0.1)
    assert found.steps.tolist() == [[60, 80], [0, 100]]
    assert found.starts.tolist() == [[0, 0], [60, 80]]
    assert found.durations.tolist() == [0.2, 0.3, 0.4]
    assert len(simplified(short, 10, 0, 0.1)) == 3  # 10 is not under 10
    assert len(simplified(short, 20, 0, 0.05)) == 3  # nor 0.05 under 0.05


def test_saccades_in_one_direction_are_joined() -> None:
    straight = saccades(path((0, 0), (90, 0), (180, 15), (180, 200), durations=[0.2, 0.05, 0.3, 0.4]))
    found = simplified(straight, 0, 10, 0.1)
    assert found.steps.tolist() == [[180, 15], [0, 185]] and found.durations.tolist() == [0.2, 0.3, 0.4]
    assert len(simplified(straight, 0, 9, 0.1)) == 3  # the angle is 9.46 degrees
    long = saccades(path((0, 0), (90, 0), (180, 15), (180, 200), durations=[0.05, 0.2, 0.05, 0.05]))
    assert len(simplified(long, 0, 10, 0.1)) == 3  # only the fixation between them counts


def test_the_last_small_saccade_is_joined_to_the_one_before() -> None:
    found = simplified(
        saccades(path((0, 0), (100, 0), (100, 100), (105, 100), durations=[0.3, 0.4, 0.05, 0.6])), 20, 0, 0.1
    )
    assert found.steps.tolist() == [[100, 0], [5, 100]]
    assert found.durations.tolist() == [0.3, 0.4, 0.4, 0.6]


def test_joining_goes_on_until_nothing_changes() -> None:
    xy = [(5.0 * i, 0.0) for i in range(9)]
    found = simplified(saccades(path(*xy, (200, 200), durations=[0.01] * 10)), 12, 0, 0.1)
    assert len(found) < 5
    assert found.steps.sum(0).tolist() == [200, 200]


def test_a_saccade_without_length_has_no_direction() -> None:
    still = saccades(path((0, 0), (0, 0), (100, 0), (200, 0), durations=[0.01] * 4))
    assert len(simplified(still, 0, 180, 0.1)) == 2
    assert simplified(still, 0, 180, 0.1).steps.tolist() == [[0, 0], [200, 0]]


def test_simplification_is_used() -> None:
    one, other = drawn(12, 3), drawn(9, 4)
    simple = Simplify(amplitude=150, angle=45, duration=0.3)
    assert multimatch(one, other, simplify=simple) != multimatch(one, other)
    assert multimatch(one, other, simplify=Simplify(0, 0, 0)) == multimatch(one, other)


def test_refused_calls_of_multimatch(monkeypatch: pytest.MonkeyPatch) -> None:
    one = drawn(4, 0)
    with pytest.raises(ShapeError, match="images of one size"):
        multimatch(one, path((1, 1), size=(10, 10)))
    with pytest.raises(OptionError, match="simplify needs the durations"):
        multimatch(one, Scanpath(one.fixations, SIZE), simplify=Simplify(1, 1, 1))
    with pytest.raises(OptionError, match="angle=-1 must be at least 0"):
        Simplify(1, -1, 1)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(OptionError, match="MultiMatch needs scipy"):
        multimatch(one, one)


def test_all_orders_of_a_scanpath_score_at_most_itself() -> None:
    xy = torch.tensor([[10.0, 10], [200, 150], [390, 290], [20, 280]])
    own = Scanpath(xy, SIZE)
    for order in itertools.permutations(range(4)):
        other: Tensor = xy[list(order)]
        score = scanmatch(own, Scanpath(other, SIZE))
        assert score <= 1 and (score == 1) == (order == (0, 1, 2, 3))
