"""Progress is a bar on a terminal and lines in a log."""

from __future__ import annotations

import pytest

from foveate.cli import console
from foveate.cli.console import Bar, duration


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(console, "time", fake)
    return fake


def test_a_log_gets_periodic_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("training") as bar:
        for step in range(101):
            bar.at(step, 100, f"loss {step}" if step else "")
            clock.now += 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "loss 5, 5 of 100, 5.0 s, about 1 min 35 s left",
        "loss 35, 35 of 100, 35 s, about 1 min 5 s left",
        "loss 65, 65 of 100, 1 min 5 s, about 35 s left",
        "loss 95, 95 of 100, 1 min 35 s, about 5.0 s left",
    ]


def test_earlier_steps_do_not_count_for_the_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("training") as bar:
        bar.at(900, 1000, "")
        clock.now += 10
        bar.at(910, 1000, "")
    assert capsys.readouterr().err == "training, 910 of 1000, 10 s, about 1 min 30 s left\n"


def test_the_bar_counts_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("loading") as bar:
        clock.now += 6
        bar.say("reading weights")
        bar.start(4)
        clock.now += 40
        bar.advance("full")
    assert capsys.readouterr().err.splitlines() == ["reading weights", "full, 1 of 4, 46 s, about 2 min 0 s left"]


def test_work_that_has_begun_is_not_loading(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run has no finished step to name yet."""
    with Bar("loading") as bar:
        clock.now += 6
        bar.start(4)
    assert capsys.readouterr().err == "running, 0 of 4, 6.0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bar("loading [not markup]") as bar:
        bar.start(2)
        bar.advance("first")
        bar.say("second")
    err = capsys.readouterr().err
    assert "second" in err
    assert "1/2" in err
    assert "left:" in err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
