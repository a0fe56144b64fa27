"""The page of a study: its numbers are the report's, texts stay texts, and it loads nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from foveate.core.catalog import system
from foveate.core.errors import OptionError, ShapeError
from foveate.report.study import command, from_json, ledger, lines, render, to_json
from foveate.studies import Curve, Finding, Plot, StudyReport
from tests.report.conftest import ATTACK, IMAGE, SCRIPT

ROW = system("scan_and_snap")
HELD = Finding("It holds.", "above 1", 1.25, 1.0, "higher", unit="ratio")
FAILED = Finding("It fails | badly.", "0.5", 0.75, 0.5, "equal", 0.1)
PLOT = Plot("A plot", "x", "y", [Curve("one", (1, 2), (3, 4), (3, 5))])
REPORT = StudyReport("Made", 7, [HELD, FAILED], [PLOT], {"sizes": [1, [2]], "steps": 3}, 12.3)


@pytest.mark.parametrize(
    ("measured", "better", "holds"),
    [
        (1.0, "higher", True), (0.99, "higher", False), (1.0, "lower", True), (1.01, "lower", False),
        (1.1, "equal", True), (1.11, "equal", False), (math.nan, "higher", False), (math.nan, "lower", False),
        (math.nan, "equal", False),
    ],
)  # fmt: skip
def test_a_finding_holds_on_its_side_of_the_bound(measured: float, better: str, holds: bool) -> None:
    assert Finding("It.", "so", measured, 1.0, better, 0.1000001 if better == "equal" else 0.0).holds is holds


def test_a_finding_says_what_it_needs() -> None:
    assert HELD.needed == "at least 1" and FAILED.needed == "0.5 ± 0.1"
    assert replace(HELD, better="lower").needed == "at most 1"
    with pytest.raises(OptionError, match="better='above' must be one of 'higher', 'lower', 'equal'"):
        replace(HELD, better="above")
    with pytest.raises(OptionError, match="tolerance=-1"):
        replace(HELD, tolerance=-1)


def test_a_curve_has_as_many_values_as_places() -> None:
    for lists in (((1, 2), (1,)), ((1, 2), (1, 2), (1, 2, 3))):
        with pytest.raises(ShapeError, match="curve 'a' must have as many values as places: 2; got"):
            Curve("a", *lists)


def test_a_report_is_plain_data() -> None:
    assert not REPORT.holds and replace(REPORT, findings=[HELD]).holds
    assert StudyReport.from_json(REPORT.to_json()) == REPORT
    assert StudyReport.from_json(REPORT.to_json()).seconds == 12.3
    assert replace(REPORT, seconds=1.0) == REPORT != replace(REPORT, seed=8)
    broken = replace(REPORT, findings=[replace(HELD, measured=math.nan)])
    assert json.loads(broken.to_json())["findings"][0]["measured"] is None
    again = StudyReport.from_json(broken.to_json())
    assert math.isnan(again.findings[0].measured) and not again.holds
    gaps = replace(REPORT, plots=[Plot("", "", "", [Curve("a", (1, 2), (math.inf, 1))])])
    assert math.isnan(StudyReport.from_json(gaps.to_json()).plots[0].curves[0].y[0])
    assert "holds: It holds. Measured 1.25, at least 1 needed." in str(REPORT) and "FAILS: It fails" in str(REPORT)


def test_the_page_has_the_numbers_and_loads_nothing() -> None:
    page = render(ROW, REPORT)
    assert "1 of 2 statements hold." in page and ROW.url in page and "default-src &#39;none&#39;" in page
    assert re.findall(r'<tr class="(right|wrong)">', page) == ["right", "wrong"]
    for text in (
        "It holds.",
        "above 1",
        "1.25 ratio",
        "at least 1",
        "0.5 ± 0.1",
        "foveate study scan_and_snap --seed 7",
    ):
        assert text in page
    assert page.count("<svg") == 1 and "<script" not in page and " src=" not in page
    assert "--quick" not in page and "--quick" in render(ROW, REPORT, quick=True)


def test_texts_stay_texts() -> None:
    finding = replace(HELD, statement=ATTACK, prediction=ATTACK, unit=ATTACK)
    plot = Plot(ATTACK, ATTACK, ATTACK, [Curve(ATTACK, (1, 2), (1, 2))])
    hostile = StudyReport(ATTACK, 0, [finding], [plot], {ATTACK: ATTACK})
    for page in (render(replace(ROW, title=ATTACK), hostile), hostile._repr_html_()):
        assert SCRIPT not in page and IMAGE not in page and "\x1b" not in page and "\u202e" not in page
    assert all("\x1b" not in str(line) for line in lines(ROW, hostile))


def test_json_and_ledger_name_the_study() -> None:
    content = json.loads(to_json(ROW, REPORT))
    assert (content["format"], content["key"], content["holds"]) == ("foveate.study/1", "scan_and_snap", False)
    assert content["command"] == command(ROW, REPORT) and from_json(to_json(ROW, REPORT)) == REPORT
    part = ledger(ROW, REPORT)
    assert part[0] == "## scan_and_snap" and "Seed 7, 12 s: `foveate study scan_and_snap --seed 7`." in part[2]
    assert part[-2] == "| It holds. | above 1 | 1.25 ratio | at least 1 | yes |"
    assert part[-1] == "| It fails \\| badly. | 0.5 | 0.75 | 0.5 ± 0.1 | **no** |"
