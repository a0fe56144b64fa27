"""`foveate study` at the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import foveate.studies.base.study
from foveate.cli import app
from foveate.core.catalog import systems
from tests.contracts.studies import Coins

KEYS = [row.key for row in systems(room="studies")]


def run(*args: object):
    return CliRunner().invoke(app, ["study", *(str(arg) for arg in args)])


@pytest.fixture
def coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study of every key is one of coins."""
    monkeypatch.setattr(foveate.studies.base.study, "study_of", lambda key: Coins)


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys\nfrom foveate.cli import main\n"
        "try: main(['study', '--list'])\n"
        "except SystemExit as done: sys.exit(done.code or bool({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for key in KEYS:
        assert key in found.stdout
    assert [each["key"] for each in json.loads(run("--list", "--json").stdout)] == KEYS


def test_a_run_prints_each_statement_and_writes_both_files(coins: None, tmp_path: Path) -> None:
    found = run("scan_and_snap", "--seed", 2, "--out", tmp_path / "new")
    assert found.exit_code == 0, found.output
    assert "✓ Coins are fair." in found.stdout and "predicted  share of heads: 0.5" in found.stdout
    assert "0.5 ± 0.05 needed: holds" in found.stdout and "2 of 2 statements hold, seed 2" in found.stdout
    assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock", "scan_and_snap.html", "scan_and_snap.json"}
    content = json.loads((tmp_path / "new" / "scan_and_snap.json").read_text("utf-8"))
    assert content["seed"] == 2 and content["study"] == "Coins" and content["options"] == {"throws": 1000}
    assert (
        json.loads(run("scan_and_snap", "--seed", 2, "--out", tmp_path, "--json").stdout)["findings"]
        == content["findings"]
    )


def test_a_statement_that_fails_exits_with_3(coins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coins, "example", classmethod(lambda cls: cls(throws=1)))
    found = run("scan_and_snap", "--quick", "--out", tmp_path)
    assert found.exit_code == 3 and "✗ Coins are fair." in found.stdout and "needed: fails" in found.stdout
    assert (tmp_path / "scan_and_snap.html").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: KEY must name a study; `foveate study --list` shows them"),
        (["scan_and_snip"], 'error: unknown system "scan_and_snip"; did you mean "scan_and_snap"'),
        (["hip"], 'error: system "hip" of the room ops has no study; studies: '),
        (["scan_and_snap", "--quick", "--seed", "-1"], "error: seed=-1 must be a whole number, at least 0"),
        (["scan_and_snap", "--quick", "--seed", str(2**63)], f"error: seed={2**63} must be at most"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(args: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(*args, "--out", out)
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith(message) and found.stderr.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_is_a_file_is_refused(coins: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = run("scan_and_snap", "--out", tmp_path / "file")
    assert found.exit_code == 2 and "is a file; it must be a folder" in found.stderr


def test_an_interrupt_exits_with_1(coins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self, generator):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Coins, "measure", stop)
    found = run("scan_and_snap", "--out", tmp_path)
    assert found.exit_code == 1 and found.stderr.strip().endswith("interrupted")


def test_options_come_from_a_file(coins: None, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("seed = 4\n", "utf-8")
    found = run("scan_and_snap", "--config", tmp_path / "c.toml", "--out", tmp_path)
    assert found.exit_code == 0 and "seed 4" in found.stdout
