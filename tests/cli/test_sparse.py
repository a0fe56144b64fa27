"""`foveate bench sparse` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.bench.sparsity import run as module
from foveate.bench.sparsity.captured import Inputs
from foveate.cli import app
from foveate.core.errors import Interrupted

SMALL = ("--lengths", "64, 96", "--operators", "sliding_window,gna", "--rounds", 1, "--heads", 2, "--dim", 8)


@pytest.fixture(autouse=True)
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tensors of the model be random ones."""

    def captured(model: str | None, tokens: int, say: object) -> Inputs:
        assert model is None
        return module._random(tokens, 2, 8)

    monkeypatch.setattr(module, "captured", captured)


def run(*args: object):
    return CliRunner().invoke(app, ["bench", "sparse", *(str(arg) for arg in args)])


def test_the_table_the_plot_and_the_results(tmp_path: Path) -> None:
    result = run(*SMALL, "--out", tmp_path, "--tokens", 64)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("sliding_window") == 2
    assert "of the ideal" in result.stdout
    assert "Dense attention is faster in" in result.stdout
    assert (tmp_path / "sparse.svg").read_text().startswith("<svg")
    found = json.loads(run(*SMALL, "--out", tmp_path, "--tokens", 64, "--json").stdout)
    assert found["format"] == "foveate.sparse/1"
    assert [row["length"] for row in found["rows"]] == [64, 64, 96, 96]
    assert found["rows"][2]["error"] is None
    assert found == json.loads((tmp_path / "sparse.json").read_text())


def test_options_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('lengths = [64]\noperators = ["gna"]\nrounds = 1\nheads = 2\ndim = 8\n')
    found = run("--config", tmp_path / "mine.toml", "--out", tmp_path / "out", "--json")
    assert [row["operator"] for row in json.loads(found.stdout)["rows"]] == ["gna"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--lengths", "many"), "lengths='many' must be whole numbers, separated by commas"),
        (("--lengths", ""), "lengths must hold at least one"),
        (("--operators", "softmax"), 'unknown sparse operator "softmax"'),
        (("--inputs", "nowhere"), "inputs=nowhere cannot be read as safetensors"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, args: tuple[str, str], message: str) -> None:
    result = run(*SMALL, *args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupt_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(**given: object) -> None:
        raise Interrupted(2, 4)

    monkeypatch.setattr(module, "sparse", stopped)
    result = run(*SMALL, "--out", tmp_path)
    assert result.exit_code == 1
    assert "interrupted: 2 of 4 rows are kept" in result.stderr
