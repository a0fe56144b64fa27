"""Paired tests: known values, no false findings under the null, and intervals that hold the truth."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from foveate.bench.parts.paired_tests import MCNEMAR, PERMUTATION, fewest, holm, paired


def test_mcnemars_test_counts_the_examples_that_differ() -> None:
    first, second = [1.0] * 9 + [0.0] * 1 + [1.0] * 10, [0.0] * 9 + [1.0] * 1 + [1.0] * 10
    found = paired(first, second)
    # 9 of 10 discordant pairs: 2 * (1 + 10) / 2**10
    assert (found.name, found.p, found.difference) == (MCNEMAR, pytest.approx(22 / 1024), pytest.approx(0.4))
    assert paired(second, first).p == found.p and paired(second, first).difference == -found.difference
    assert paired([1.0] * 5, [1.0] * 5).p == 1.0


def test_equal_answers_leave_a_difference_open() -> None:
    low, high = paired([1.0] * 20, [1.0] * 20).interval
    assert -0.2 < low < -0.1 and 0.1 < high < 0.2


def test_a_permutation_test_tries_every_sign() -> None:
    found = paired([0.3, 0.5, 0.7, 0.9], [0.1, 0.2, 0.3, 0.8])
    assert (found.name, found.p) == (PERMUTATION, 2 / 16)
    assert paired([0.1, 0.5, 0.3], [0.2, 0.4, 0.3]).p == 1.0
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_many_differences_draw_signs() -> None:
    draw = random.Random(0)
    second = [draw.random() for _ in range(40)]
    near = [value + draw.gauss(0, 0.1) for value in second]
    far = [value + 0.3 + draw.gauss(0, 0.1) for value in second]
    assert paired(near, second).p > 0.05 and paired(far, second).p < 0.001
    assert paired(far, second).p > 0, "a drawn test never says that something is impossible"


@pytest.mark.parametrize("binary", [True, False])
def test_without_a_difference_few_tests_find_one(binary: bool) -> None:
    draw = random.Random(1)

    def scores() -> list[float]:
        return [float(draw.random() < 0.6) if binary else draw.random() for _ in range(10)]

    found = sum(paired(scores(), scores()).p < 0.05 for _ in range(300))
    assert found <= 24, "at most 5 %, and the 99 % bound of a count around it"


def test_intervals_of_proportions_hold_the_truth() -> None:
    """The second solves what the first does, less some: the true difference is 0.2, and both are correlated."""
    draw, held = random.Random(2), 0
    for _ in range(400):
        first = [float(draw.random() < 0.8) for _ in range(25)]
        second = [score * float(draw.random() < 0.75) for score in first]
        low, high = paired(first, second).interval
        held += low <= 0.2 <= high
    assert 0.93 <= held / 400 <= 1.0


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_holms_correction_keeps_false_findings_rare() -> None:
    draw = random.Random(3)
    families = [[draw.random() for _ in range(20)] for _ in range(400)]
    assert fmean(min(holm(family)) < 0.05 for family in families) < 0.08
    assert fmean(min(family) < 0.05 for family in families) > 0.5


def test_the_fewest_examples_are_enough_and_one_less_is_not() -> None:
    for tests in (1, 28, 84):
        count = fewest(tests)
        assert tests * paired([1.0] * count, [0.0] * count).p <= 0.05
        assert tests * paired([1.0] * (count - 1), [0.0] * (count - 1)).p > 0.05
