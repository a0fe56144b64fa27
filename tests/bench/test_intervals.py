"""Intervals agree with known values, and contain the true value as often as they should."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from foveate.bench.parts import intervals, timing


@pytest.mark.parametrize("hits, count, low, high", [
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0),
    (50, 100, 0.4038, 0.5962),
])  # fmt: skip
def test_wilson_agrees_with_known_values(hits: int, count: int, low: float, high: float) -> None:
    assert intervals.wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_the_scores_select_the_interval() -> None:
    assert intervals.of_scores([1.0, 0.0, 1.0, math.nan]) == intervals.wilson(2, 3)
    assert intervals.of_scores([0.2, 0.9, 0.4]) == intervals.bootstrap((0.2, 0.9, 0.4))
    assert intervals.of_scores([]) is intervals.of_scores([0.3]) is None


@pytest.mark.parametrize("count, low, high", [(3, 0, 2), (5, 0, 4), (6, 0, 5), (9, 1, 7), (20, 5, 14), (100, 39, 60)])
def test_the_medians_interval_ends_at_values(count: int, low: int, high: int) -> None:
    values = list(range(count))
    random.Random(1).shuffle(values)
    assert intervals.of_median(values) == ((count - 1) / 2, low, high)


@pytest.mark.parametrize("make", [
    lambda draw: intervals.wilson(sum(draw.random() < 0.8 for _ in range(40)), 40),
    lambda draw: intervals.bootstrap(tuple(draw.random() ** 0.25 for _ in range(40))),
    lambda draw: intervals.of_median([0.8 * math.exp(draw.gauss(0, 0.3)) for _ in range(20)])[1:],
], ids=["wilson", "bootstrap", "median"])  # fmt: skip
def test_intervals_have_their_nominal_coverage(make) -> None:
    draw = random.Random(0)
    coverage = fmean(low <= 0.8 <= high for low, high in (make(draw) for _ in range(200)))
    assert 0.90 <= coverage <= 0.99


def test_threads_follow_the_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(1000, 4000), (1150, 4400)])
    monkeypatch.setattr(timing, "_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(timing, "_ticks", lambda cores: next(ticks))
    monkeypatch.setattr(timing, "_SAMPLE", 0)
    assert timing.free_cores() == 2  # 150 of 400 ticks on four cores: one and a half of them are busy
    monkeypatch.setattr(timing, "_ticks", lambda cores: None)
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (7.0, 1.0, 1.0))
    assert timing.free_cores() == 1
    monkeypatch.setattr(timing, "free_cores", lambda: 1)
    before = timing.torch.get_num_threads()
    for name in timing._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with timing.threads() as count:
        assert count == timing.torch.get_num_threads() == 1
    assert timing.torch.get_num_threads() == before
