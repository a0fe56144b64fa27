"""The contract of studies: they run from a seed alone, say what they measure, and hold."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from typer.testing import CliRunner

from foveate.cli import app
from foveate.cli.study import FAILS
from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError, UnknownKey
from foveate.report.study import from_json, lines, render, to_json
from foveate.studies import Study, StudyReport
from foveate.studies.base.study import study_of
from tests.contracts.studies import STUDIES, Coins

EVERY = pytest.mark.parametrize("key", STUDIES)


@cache
def report(key: str, seed: int = 0) -> StudyReport:
    """Return the report of a study's small sizes."""
    return STUDIES[key].example().run(seed)


def generators() -> list[object]:
    name, words, *rest = numpy.random.get_state()  # noqa: NPY002  the global generator is meant
    return [torch.get_rng_state().tolist(), (name, words.tolist(), *rest), random.getstate()]


def test_every_row_of_the_room_has_a_study() -> None:
    assert STUDIES.keys() == {row.key for row in systems(room="studies")}
    assert all(issubclass(cls, Study) for cls in STUDIES.values())
    assert len({cls.__name__ for cls in STUDIES.values()}) == len(STUDIES)


@EVERY
def test_the_small_sizes_take_a_few_seconds(key: str) -> None:
    assert report(key).seconds < 10


@EVERY
def test_a_seed_decides_all_numbers_and_nothing_global_moves(key: str) -> None:
    first, before = report(key), generators()
    assert STUDIES[key].example().run(0) == first
    assert generators() == before
    torch.manual_seed(5)
    other = report(key, 1)
    assert [finding.measured for finding in other.findings] != [finding.measured for finding in first.findings]
    assert [finding.statement for finding in other.findings] == [finding.statement for finding in first.findings]


@EVERY
def test_findings_and_plots_are_complete(key: str) -> None:
    found = report(key)
    assert len(found.findings) >= 3 and found.plots
    assert len({finding.statement for finding in found.findings}) == len(found.findings)
    for finding in found.findings:
        assert finding.statement.endswith(".") and finding.prediction, finding
        assert all(map(math.isfinite, (finding.measured, finding.bound, finding.tolerance))), finding
        assert (finding.better == "equal") == (finding.tolerance > 0), finding
    for plot in found.plots:
        assert plot.title and plot.x_label and plot.y_label and plot.curves
        for curve in plot.curves:
            assert curve.name and len(curve.x) == len(curve.y) > 0
            assert all(map(math.isfinite, (*curve.x, *curve.y, *(curve.predicted or ()))))
            assert curve.predicted is None or len(curve.predicted) == len(curve.x)
    assert any(curve.predicted is not None for plot in found.plots for curve in plot.curves)


@EVERY
def test_a_report_survives_json(key: str) -> None:
    found, row = report(key), system(key)
    assert StudyReport.from_json(found.to_json()) == found
    content = json.loads(to_json(row, found))
    assert content["key"] == key and content["holds"] == found.holds and content["seed"] == 0
    assert from_json(to_json(row, found)) == found
    assert set(found.options) == {field.name for field in fields(STUDIES[key])}  # type: ignore[arg-type]


@EVERY
def test_a_report_shows_each_statement_everywhere(key: str) -> None:
    found, row = report(key), system(key)
    page = render(row, found)
    html, text = found._repr_html_(), str(found)
    plain = "\n".join(map(str, lines(row, found)))
    for finding in found.findings:
        assert finding.statement in text and finding.statement in plain and finding.prediction in plain
    assert page.count('class="verdict" ') == html.count("<tr><td>") == len(found.findings)
    assert page.count("<svg") == html.count("<svg") == len(found.plots)
    for mark in ("<script", 'http-equiv="refresh', " src=", "url("):
        assert mark not in page


@EVERY
def test_options_are_checked_by_name(key: str) -> None:
    cls = STUDIES[key]
    with pytest.raises(OptionError, match="has no option"):
        cls(no_such_size=3)
    for field in fields(cls):  # type: ignore[arg-type]
        if field.type == "int":
            for bad in (2.5, -3, "many"):
                with pytest.raises(OptionError, match=field.name):
                    replace(cls(), **{field.name: bad})
    with pytest.raises(OptionError, match="seed=-1"):
        cls().run(-1)


@EVERY
@pytest.mark.slow
def test_the_whole_study_holds_in_time(key: str) -> None:
    start = time.perf_counter()
    found = STUDIES[key]().run()
    assert time.perf_counter() - start < 120
    assert [finding.statement for finding in found.findings if not finding.holds] == []


@EVERY
def test_the_command_prints_and_writes_it(key: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["study", key, "--quick", "--out", str(tmp_path)])
    expected = report(key)
    assert found.exit_code == (0 if expected.holds else FAILS), found.output
    assert "statements hold, seed 0" in found.stdout
    assert str(tmp_path / f"{key}.html") in "".join(found.stdout.split("\n"))
    assert from_json((tmp_path / f"{key}.json").read_text("utf-8")) == expected
    assert f"foveate study {key} --seed 0 --quick" in (tmp_path / f"{key}.html").read_text("utf-8")


# -- the base class ----------------------------------------------------------------------------------------------------


def test_the_base_collects_findings_and_plots_and_reports_progress() -> None:
    calls: list[tuple] = []
    found = Coins(throws=400).run(3, lambda *call: calls.append(call))
    assert [finding.statement for finding in found.findings] == ["Coins are fair.", "Coins fall."]
    assert calls == [(1, None, "Coins are fair."), (2, None, "Coins fall.")]
    assert (found.study, found.seed, found.options) == ("Coins", 3, {"throws": 400})
    assert len(found.plots) == 1 and found.holds


def test_a_system_without_a_study_is_refused_by_name() -> None:
    with pytest.raises(UnknownKey, match='did you mean "scan_and_snap"'):
        study_of("scan_and_snip")
    with pytest.raises(OptionError, match='system "hip" of the room ops has no study; studies: pavlovian_attention, '):
        study_of("hip")
