"""Plots as SVG: places on axes, round ticks, and texts that stay texts."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from foveate.pages.plot import Axis, Line, drawn
from foveate.studies import Curve, Plot
from tests.report.conftest import ATTACK

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def strokes(svg: str) -> list[dict[str, str]]:
    """The attributes of curves, without grid and legend."""
    paths = [each.attrib for each in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    return [each for each in paths if each.get("fill") == "none"]


def test_a_value_lies_in_proportion_to_its_axis() -> None:
    linear, log = Axis(0, 10, 100, 200, False), Axis(-1, 3, 100, 0, True)
    assert [linear.place(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert [log.place(value) for value in (0.1, 10, 1000)] == [100, 50, 0]
    assert linear.place(math.nan) is linear.place(math.inf) is log.place(0) is log.place(-3.0) is None


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(-0.2, 10.3, 0, 1, False), [0, 5, 10]),
        (Axis(0.31, 0.52, 0, 1, False), [0.35, 0.4, 0.45, 0.5]),
        (Axis(-3, 3, 0, 1, False), [-2, 0, 2]),
        (Axis(0, 2, 0, 1, True), [1, 2, 5, 10, 20, 50, 100]),
        (Axis(-3.1, 2.2, 0, 1, True), [1e-3, 1e-2, 0.1, 1, 10, 100]),
    ],
)
def test_ticks_are_round_and_inside(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


def test_curves_are_drawn_through_their_points_and_predictions_dashed() -> None:
    svg = drawn([Line("a", (0, 1, 2), (0, 1, 4), (0, 2, 4)), Line("b", (0, 2), (4, 0))], "Title", "time", "size")
    assert len(strokes(svg)) == 3 and sum("stroke-dasharray" in each for each in strokes(svg)) == 1
    solid = re.findall(r"[\d.]+ [\d.]+", strokes(svg)[0]["d"])
    x = [float(point.split()[0]) for point in solid]
    y = [float(point.split()[1]) for point in solid]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and y[0] - y[2] == pytest.approx(
        4 * (y[0] - y[1]), abs=0.3
    )
    for name in ("time", "size", "a", "b", "predicted"):
        assert name in texts(svg)
    assert ElementTree.fromstring(svg).get("aria-label") == "Title"
    assert "predicted" not in texts(drawn([Line("a", (0, 1), (0, 1))], "", "", ""))


def test_numbers_that_an_axis_cannot_show_are_left_out() -> None:
    svg = drawn([Line("a", (0, 1, 10, 100), (1, math.nan, 3, 4))], "", "x", "y", log_x=True)
    assert len(re.findall(r"[\d.]+ [\d.]+", strokes(svg)[0]["d"])) == 2
    assert "nan" not in svg and "inf" not in svg
    for lines in ([], [Line("one", (3,), (3,))], [Line("none", (0,), (math.inf,))], [Line("flat", (0, 1), (0, 0))]):
        assert "nan" not in drawn(lines, "", "x", "y", log_x=True, log_y=True)


def test_texts_cannot_leave_the_drawing() -> None:
    plot = Plot(ATTACK, ATTACK, ATTACK, [Curve(ATTACK, (1, 2), (1, 2))])
    svg = plot.svg()
    assert {each.tag for each in ElementTree.fromstring(svg).iter()} == {f"{SVG}svg", f"{SVG}path", f"{SVG}text"}
    assert "<script" not in svg and "\x1b" not in svg
