"""The figures of training and recall, as the numbers that Plotly draws."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from foveate.bench.recall_figure import Point
from foveate.report import curves
from foveate.train.loop.loop import History


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Collect the figures in place of writing their pages."""
    figures: list[Any] = []
    monkeypatch.setattr(curves, "_write", lambda figure, path: figures.append(figure) or path)
    return figures


def test_one_training_shows_its_losses_and_their_running_mean(drawn: list[Any], tmp_path: Path) -> None:
    losses = [4.0 - 0.1 * step for step in range(30)]
    curves.loss({0: History(losses, {15: 0.5, 30: 0.75})}, "softmax on <lm>", tmp_path / "loss.html")
    (figure,) = drawn
    assert figure.layout.title.text == "softmax on &lt;lm&gt;"
    raw, mean, accuracy = figure.data
    assert [trace.name for trace in figure.data] == ["loss", "loss, smoothed", "accuracy, held out"]
    assert list(raw.x) == list(range(1, 31)) and list(raw.y) == losses
    assert list(mean.y) == curves.smooth(losses)
    assert (list(accuracy.x), list(accuracy.y)) == ([15, 30], [50.0, 75.0])
    assert accuracy.yaxis == "y2" and accuracy.error_y.array is None


def test_several_seeds_show_their_mean_and_deviation(drawn: list[Any], tmp_path: Path) -> None:
    runs = {seed: History([2.0 + seed] * 40, {40: 0.5 + 0.1 * seed}) for seed in (3, 5)}
    curves.loss(runs, "softmax", tmp_path / "loss.html")
    (figure,) = drawn
    assert figure.layout.title.text == "softmax, 2 seeds"
    assert [trace.name for trace in figure.data[:3]] == ["loss, seed 3", "loss, seed 5", "loss, mean"]
    assert list(figure.data[2].y) == pytest.approx([6.0] * 40)
    accuracy = figure.data[3]
    assert list(accuracy.y) == pytest.approx([90.0])
    assert list(accuracy.error_y.array) == pytest.approx([statistics.stdev([80.0, 100.0])])


def test_the_running_mean_begins_with_the_first_loss() -> None:
    assert curves.smooth([3.0]) == pytest.approx([3.0])
    assert curves.smooth([3.0, 1.0], share=1.0) == pytest.approx([3.0, 5 / 3])  # weights 1/4 and 1/2
    assert curves.smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    later = curves.smooth([0.0] * 50 + [1.0] * 50)
    assert later[49] == 0.0 and later[54] > 0.6


def point(label: str, family: str, state_bytes: int, accuracy: float) -> Point:
    return Point(label, family, 1e-3, 10, state_bytes, accuracy, accuracy, 1.0)


def test_recall_is_drawn_in_percent_against_the_state_in_kilobytes(drawn: list[Any], tmp_path: Path) -> None:
    points = [point("b", "linear", 8192, 0.25), point("a", "linear", 2048, 0.5), point("<c>", "attention", 65536, 1.0)]
    curves.recall(points, "Recall", tmp_path / "recall.html")
    (figure,) = drawn
    attention, linear = figure.data
    assert (list(linear.x), list(linear.y), list(linear.text)) == ([2048, 8192], [50.0, 25.0], ["a", "b"])
    assert list(attention.text) == ["&lt;c&gt;"] and figure.layout.title.text == "Recall"
    ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert (ticks["1"], ticks["2"], ticks["0.5"], ticks["64"]) == (1024, 2048, 512, 65536)
    low, high = figure.layout.xaxis.range
    assert 10**low < 2048 < 65536 < 10**high


def test_labels_of_near_markers_take_different_sides() -> None:
    near = [point(name, "linear", 1000 + number, 0.5 + 0.01 * number) for number, name in enumerate("abcd")]
    places = curves.label_places([*near, point("far", "linear", 9000, 0.5), point("low", "linear", 1000, 0.3)])
    assert len({places[name] for name in "abcd"}) == 4
    assert places["far"] == places["low"] == places["d"] == "top center"
