"""A comparison as CSV and Parquet, and the history of a folder's runs."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.bench.comparison import history
from foveate.bench.comparison.export import COLUMNS, check, export
from foveate.bench.comparison.results import Answer, Comparison, LookedUp, Row
from foveate.cli import app
from foveate.core.errors import OptionError
from foveate.report import history as page

TEXT = 'a, "b"\nnaïve \udc80'


@pytest.fixture
def comparison() -> Comparison:
    answers = [Answer("p", "e", TEXT, 1.0, 9, 0.5, 0.4, 10.0, 2.0, 20.0, 4.0), Answer("q", "e", "o", 0.0, error="long")]
    lost = [LookedUp(1, 0, 1.0, 0.75, [], {})]
    rows = [
        Row("full", "Full", {}, 1.0, 1.0, 1.0, 20.0, 4.0, 1.0, 2.0, 3.0, answers),
        Row("knorm", "KNorm", {}, 0.5, 0.5, 0.4, 10.0, 2.0, 1.0, 2.0, 3.0, answers, budget=0.5, lost=lost),
        Row.failed("hip", "HiP", "no", budget=0.5),
    ]
    settings = dict(model="m", task="t", seed=3, device="cpu", dtype="float32", budgets=[0.5], examples=2, length=None)
    return Comparison(**settings, versions={"foveate": "1"}, rows=rows)  # type: ignore[arg-type]


def test_csv_has_a_line_for_each_answer(comparison: Comparison, tmp_path: Path) -> None:
    file = export(comparison, tmp_path / "new" / "a.csv")
    with file.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 5
    first, _, _, fourth, failed = lines
    assert (first["method"], first["budget"], first["example"], first["score"]) == ("full", "", "0", "1.0")
    assert first["output"] == 'a, "b"\nnaïve ?' and first["memory_mb"] == "2.0" and first["seed"] == "3"
    assert (fourth["method"], fourth["budget"], fourth["dropped"], fourth["error"]) == ("knorm", "0.5", "0.75", "long")
    assert fourth["prefill_ms"] == "", "a number that is not known is empty"
    assert (failed["method"], failed["example"], failed["error"], failed["score"]) == ("hip", "", "no", "")


def test_parquet_has_the_same_lines_with_types(comparison: Comparison, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    found = parquet.read_table(export(comparison, tmp_path / "a.parquet"))
    with export(comparison, tmp_path / "a.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line, row in zip(lines, found.to_pylist(), strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}
    kinds = {name: str(kind) for name, kind in zip(found.column_names, found.schema.types, strict=True)}
    assert (kinds["score"], kinds["example"], kinds["output"]) == ("double", "int64", "string")
    assert list(tmp_path.glob(".*")) == []


def test_a_file_that_cannot_be_written_is_refused(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "b.csv").mkdir()
    for name, message in (("a.xls", "must end in .csv or .parquet"), ("b.csv", "is a folder")):
        with pytest.raises(OptionError, match=message):
            check(tmp_path / name)
    for name in ("file/a.csv", "file/a.parquet"):
        with pytest.raises(OptionError, match="cannot write"):
            export(comparison, tmp_path / name)
    monkeypatch.setattr("foveate.bench.comparison.export.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs pyarrow: pip install 'foveate\[data\]'") as raised:
        check(tmp_path / "a.parquet")
    assert "\n" not in str(raised.value)


def test_a_run_is_added_once_and_another_beside_it(comparison: Comparison, tmp_path: Path) -> None:
    dates = [datetime(2026, 1, day, tzinfo=UTC) for day in (3, 1, 2)]
    history.record(comparison, tmp_path, dates[0])
    history.record(comparison, tmp_path, dates[1])
    assert len((tmp_path / history.HISTORY).read_text().splitlines()) == 1
    history.record(replace(comparison, seed=4), tmp_path, dates[2])
    with (tmp_path / history.HISTORY).open("a") as file:
        file.write('{"format": "foveate.hist')  # a run that was killed while it wrote
    found = history.runs(tmp_path)
    assert [run.settings["seed"] for run in found] == [4, 3], "in the order of the dates"
    full, knorm, hip = found[0].rows
    assert (knorm["method"], knorm["budget"], knorm["score"], knorm["memory_mb"]) == ("knorm", 0.5, 0.5, 2.0)
    assert knorm["ratios"]["memory_mb"] == [1.0, 1.0, 1.0, True] and (hip["answers"], hip["error"]) == (0, "no")
    assert full["budget"] is None and len(full["score_interval"]) == 2


def test_folders_below_count_and_results_of_earlier_versions(comparison: Comparison, tmp_path: Path) -> None:
    history.record(comparison, _made(tmp_path / "a"))
    comparison.save(_made(tmp_path / "b" / "c") / "results.json")
    (_made(tmp_path / "d") / "results.json").write_text('{"other": "program"}')
    assert {run.folder.name for run in history.runs(tmp_path)} == {"a", "c"}
    comparison.save(tmp_path / "a" / "results.json")
    assert len(history.runs(tmp_path)) == 2, "a folder with a history is not read twice"
    for folder, message in ((tmp_path / "none", "is no folder"), (tmp_path / "d", "holds no run")):
        with pytest.raises(OptionError, match=message):
            history.runs(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_the_page_has_a_column_for_each_run_of_the_same_task(comparison: Comparison, tmp_path: Path) -> None:
    later = replace(comparison, rows=[*comparison.rows[:1], replace(comparison.rows[1], score=0.25)])
    other = replace(comparison, task="<script>alert(1)</script>\x1b")
    for number, each in enumerate((comparison, later, other)):
        history.record(each, tmp_path, datetime(2026, 1, 1 + number, tzinfo=UTC))
    runs = history.runs(tmp_path)
    group, strange = (page._group(title, some, tmp_path) for title, some in page._grouped(runs).items())
    assert [head["date"] for head in group["heads"]] == ["2026-01-01 00:00", "2026-01-02 00:00"]
    assert [row["name"].replace("\xa0", " ") for row in group["rows"]] == ["full", "knorm at 50 %", "hip at 50 %"]
    scores = [cell["score"].replace("\xa0", " ") for cell in group["rows"][1]["cells"]]
    assert scores[0].startswith("50 % (") and scores[1].startswith("25 % (")
    assert group["rows"][2]["cells"][0]["more"] == "failed: no" and group["rows"][2]["cells"][1] is None
    assert len(strange["heads"]) == 1
    text = page.render(runs, tmp_path)
    assert "<script" not in text and "\x1b" not in text and "&lt;script&gt;" in text
    assert text.count("<table") == 2 and "3 runs in" in text


def test_the_command_writes_the_page_and_runs_nothing(comparison: Comparison, tmp_path: Path) -> None:
    def run(*args: object):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(app, ["compare", *map(str, args)])

    history.record(comparison, tmp_path)
    result = run("--history", tmp_path)
    assert result.exit_code == 0 and "history.html" in result.stdout
    assert "knorm at 50" in result.stdout.replace("\xa0", " ")
    assert (tmp_path / "history.html").read_text().startswith("<!doctype html>")
    wrong = run("--history", tmp_path, "--task", "needle")
    assert wrong.exit_code == 2 and "does not go with --task" in wrong.stderr
    assert run("--history", tmp_path / "none").exit_code == 2
    refused = run("--export", tmp_path / "a.xls", "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "must end in" in refused.stderr and not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_null_in_a_history(comparison: Comparison, tmp_path: Path) -> None:
    history.record(replace(comparison, rows=[Row("full", "Full", {}, math.nan, answers=[])]), tmp_path)
    (line,) = (tmp_path / history.HISTORY).read_text().splitlines()
    content = json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert content["rows"][0]["score"] is None
