"""A policy that wraps another one: its budget, and what it takes over."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.core.errors import OptionError
from foveate.kv import AdaKV, KNorm, SnapKV

HOST: Any = None  # no model is asked for the budget


@pytest.mark.parametrize(
    ("budget", "length", "sink", "recent"),
    [(0.5, 400, 0, 64), (0.25, 100, 0, 12), (0.1, 60, 0, 3), (0.01, 60, 0, 1), (1.0, 8, 0, 4)],
)
def test_at_most_half_of_a_budget_stays_in_any_case(budget: float, length: int, sink: int, recent: int) -> None:
    made = AdaKV.at_budget(budget, HOST, length)
    assert (made.share, made.sink, made.recent) == (made.base.share, made.base.sink, made.base.recent)
    assert made.share == budget and (made.sink, made.recent) == (sink, recent)
    assert made.sink + made.recent <= max(1, round(budget * length) // 2)


def test_sinks_leave_room_for_a_recent_token(monkeypatch: pytest.MonkeyPatch) -> None:
    many = SnapKV(share=0.5, sink=30, recent=32)
    monkeypatch.setattr(SnapKV, "at_budget", classmethod(lambda cls, budget, host, length: many))
    for length, sink, recent in ((100, 24, 25), (40, 9, 10), (4, 0, 1), (400, 30, 32)):
        made = AdaKV.at_budget(0.5, HOST, length)
        assert (made.base.sink, made.base.recent) == (sink, recent)


def test_a_wrapper_takes_over_the_options_of_its_base() -> None:
    made = AdaKV(KNorm(share=0.3, sink=2, recent=5, every=7, layers=(1,)))
    assert (made.share, made.sink, made.recent, made.every, made.layers) == (0.3, 2, 5, 7, (1,))
    with pytest.raises(OptionError, match="base must be a policy that scores, such as SnapKV"):
        AdaKV("snapkv")  # type: ignore[arg-type]
