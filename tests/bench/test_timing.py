"""The cores' load, read from Linux's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.bench.parts import timing

STAT = """cpu  999 999 999 999 999 999 999 999 999 999
cpu0 1 20 300 4000 50000 600000 7000000 80000000 5 5
cpu1 1 1 1 1 1 1 1 1 9 9
cpu12 2 2 2 2 2 2 2 2 9 9
intr 12345
"""


def test_ticks_are_those_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests' ticks, the last two columns, are part of the users' already; idle and waiting cores are free."""
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: STAT)
    assert timing._ticks({0}) == (87600321, 87654321)
    assert timing._ticks({1, 12}) == (18, 24)
    assert timing._ticks({7}) is None


def test_without_counters_there_are_no_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fails)
    assert timing._ticks({0}) is None


def test_counters_that_stand_still_mean_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_cores", lambda: {0, 1, 2})
    monkeypatch.setattr(timing, "_ticks", lambda cores: (10, 20))
    monkeypatch.setattr(timing, "_SAMPLE", 0)
    assert timing.free_cores() == 3
