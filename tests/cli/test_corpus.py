"""Every damaged folder and unusual file gives one line and exit code 2, or the right answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tests.corpus.everything  # noqa: F401  registers the cases
from foveate.cli import app
from tests.corpus.cases import CASES, ROWS, sound


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(tmp_path_factory.mktemp("corpus") / "sound")


def test_the_corpus_is_large() -> None:
    assert sum(case.says is not None for case in CASES.values()) >= 60


@pytest.mark.parametrize("name", CASES)
def test_each_case_runs_or_is_refused(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    case, folder, out = CASES[name], tmp_path / "made", tmp_path / "out"
    folder.mkdir()
    made = case.make(base, folder)
    capped = [] if "--new-tokens" in made else ["--new-tokens", "2"]
    found = CliRunner().invoke(
        app, ["compare", *made, *capped, "--methods", "full", "--out", str(out), "--json"], catch_exceptions=False
    )
    if case.says is not None:
        lines = [line for line in found.stderr.splitlines() if line.strip()]
        assert found.exit_code == 2, found.output
        assert (lines[-1].startswith("error: ") and re.search(case.says, lines[-1])) or case.says in lines[-1], lines
        assert not out.exists() and len(lines[-1].replace(str(tmp_path), "")) < 400
        assert not (folder / "ran").exists(), "code of the checkpoint was run"
        return
    assert found.exit_code == 0, found.output
    answers = json.loads(found.stdout)["rows"][0]["answers"]
    assert [answer["expected"] for answer in answers] == (case.expected or [row["answer"] for row in ROWS])
    if case.prompts is not None:
        assert [answer["prompt"] for answer in answers] == case.prompts
