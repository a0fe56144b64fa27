"""`foveate train` and `foveate bench recall` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.cli.train import parsed
from foveate.core.errors import OptionError


def run(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_train_writes_a_network_and_its_loss(tmp_path: Path) -> None:
    result = run(
        "train", "--op", "hedgehog", "--task", "copy", "--dim", 16, "--steps", 3, "--length", 12, "--vocabulary", 8,
        "--options", "form=softmax", "--out", tmp_path / "net",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "hedgehog on copy: accuracy" in result.stdout
    assert {"model.safetensors", "config.json", "loss.html", "training.json"} <= {
        path.name for path in (tmp_path / "net").iterdir()
    }
    compared = run("compare", "--model", tmp_path / "net", "--examples", 2, "--out", tmp_path / "out", "--json")
    assert compared.exit_code == 0, compared.output
    assert [row["method"] for row in json.loads(compared.stdout)["rows"]] == ["full"]


def test_train_in_json(tmp_path: Path) -> None:
    result = run("train", "--op", "softmax", "--task", "digits", "--dim", 16, "--steps", 2, "--out", tmp_path, "--json")
    found = json.loads(result.stdout)
    assert found["op"] == "softmax"
    assert found["task"] == "digits"
    assert found["parameters"] > 0
    assert Path(found["folder"]) == tmp_path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--op", "hedgehg"], 'unknown system "hedgehg"; did you mean "hedgehog"'),
        (["--op", "softmax", "--task", "mqr"], 'unknown task "mqr"; did you mean "mqar"'),
        (["--op", "softmax", "--heads", 3], "heads=3 must divide dim=64"),
        (["--op", "softmax", "--options", "window"], "options='window' must be NAME=VALUE"),
        (["--op", "softmax", "--options", "window=3"], 'operator "softmax"'),
        (["--op", "efficient_attention"], "MultiHeadAttention of EfficientAttention defines no causal attention"),
        (["--op", "sink_recent"], "is neither operator nor layer"),
        (["--op", "softmax", "--task", "lm", "--pairs", 3], "task lm takes no pairs"),
        (["--op", "softmax", "--length", 7], "length=7 must be even"),
        (["--op", "softmax", "--steps", 0], "steps=0 must be a whole number"),
        (["--op", "softmax", "--device", "toaster"], "device='toaster' is not usable here"),
        (["--op", "softmax", "--depth", 0], "depth=0 must be a whole number"),
    ],
)
def test_train_refuses_in_one_line(tmp_path: Path, args: list, says: str) -> None:
    result = run("train", "--out", tmp_path / "net", *args)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "net").exists()


def test_options_are_read_as_python_writes_them() -> None:
    assert parsed(None) == parsed(" ") == {}
    assert parsed("window=32, form=exp,rate=1e-3,on=True") == {"window": 32, "form": "exp", "rate": 1e-3, "on": True}
    with pytest.raises(OptionError, match="got '3=4'"):
        parsed("3=4")


def test_bench_recall(tmp_path: Path) -> None:
    args = [
        "--length",
        24,
        "--pairs",
        3,
        "--vocabulary",
        32,
        "--steps",
        2,
        "--rates",
        "1e-2,",
        "--only",
        "softmax; lightning",
    ]
    result = run("bench", "recall", *args, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "lightning" in result.stdout
    assert (tmp_path / "recall.html").is_file()
    again = run("bench", "recall", *args, "--out", tmp_path, "--json")
    assert [point["label"] for point in json.loads(again.stdout)["points"]] == ["softmax", "lightning"]
    wrong = run("bench", "recall", "--only", "nobody", "--out", tmp_path)
    assert wrong.exit_code == 2
    assert "only=nobody names no contender" in wrong.stderr
    wrong = run("bench", "recall", "--rates", "fast", "--out", tmp_path)
    assert wrong.exit_code == 2
    assert "rates='fast' must be numbers, between commas" in wrong.stderr
