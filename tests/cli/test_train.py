"""`foveate train` and `foveate bench recall` from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.bench.parts.folder import lock_folder
from foveate.cli import app
from foveate.cli.train import TASKS, listing, parsed
from foveate.core.errors import OptionError
from foveate.train.loop.loop import Training
from foveate.train.loop.network import TRAINING_TASKS


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


def test_train_prints_json(tmp_path: Path) -> None:
    result = run("train", "--op", "softmax", "--task", "digits", "--dim", 16, "--steps", 2, "--out", tmp_path, "--json")
    found = json.loads(result.stdout)
    assert found["op"] == "softmax"
    assert found["task"] == "digits"
    assert found["parameters"] > 0
    assert Path(found["folder"]) == tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "hedgehg"], 'unknown system "hedgehg"; did you mean "hedgehog"'),
        (["--op", "softmax", "--task", "mqr"], 'unknown task "mqr"; did you mean "mqar"'),
        (["--op", "softmax", "--heads", 3], "heads=3 must divide dim=64"),
        (["--op", "softmax", "--options", "window"], "options='window' must be NAME=VALUE"),
        (["--op", "softmax", "--options", "window=3"], 'operator "softmax"'),
        (["--op", "efficient_attention"], "MultiHeadAttention of EfficientAttention defines no causal attention"),
        (["--op", "sink_recent"], "must be an operator or a layer"),
        (["--op", "softmax", "--task", "lm", "--pairs", 3], "task='lm' takes no pairs"),
        (["--op", "softmax", "--length", 7], "length=7 must be even"),
        (["--op", "softmax", "--steps", 0], "steps=0 must be a whole number"),
        (["--op", "softmax", "--device", "toaster"], "device='toaster' is not usable here"),
        (["--op", "softmax", "--depth", 0], "depth=0 must be a whole number"),
        (["--op", "softmax", "--seeds", "1,x"], "seeds='1,x' must be whole numbers"),
        (["--op", "softmax", "--seeds", ","], "seeds=',' must be whole numbers"),
        (["--op", "softmax", "--seeds", "3,3"], "seeds=3,3 must name each seed once"),
        (["--op", "softmax", "--seeds", "1,2", "--seed", 3], "seed=3 and seeds='1,2' exclude each other"),
    ],
)
def test_train_refuses_in_one_line(tmp_path: Path, args: list, message: str) -> None:
    result = run("train", "--out", tmp_path / "net", *args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "net").exists()


SMALL = (
    "--op", "hedgehog", "--task", "copy", "--dim", 16, "--steps", 4, "--batch", 4, "--length", 12, "--vocabulary", 8,
)  # fmt: skip


def test_the_same_command_reads_a_finished_training(tmp_path: Path) -> None:
    first, again = (run("train", *SMALL, "--out", tmp_path / "net") for _ in range(2))
    assert first.exit_code == again.exit_code == 0
    assert "earlier run" not in first.stdout
    assert "trained by an earlier run: --fresh trains again" in again.stdout
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    other = run("train", *SMALL, "--rate", 1e-2, "--out", tmp_path / "net")
    assert other.exit_code == 2
    assert "schedule.rate was 0.003, is 0.01" in other.stderr
    assert run("train", *SMALL, "--rate", 1e-2, "--out", tmp_path / "net", "--fresh").exit_code == 0


def test_several_seeds_report_their_deviation(tmp_path: Path) -> None:
    result = run("train", *SMALL, "--seeds", "0,1,2", "--out", tmp_path / "net")
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "net" / "seeds.json").read_text())
    assert [row["seed"] for row in saved["seeds"]] == [0, 1, 2]
    assert saved["accuracy_deviation"] > 0
    shown = (
        f"accuracy {100 * saved['accuracy']:.1f} ± {100 * saved['accuracy_deviation']:.1f} % on held-out data over 3"
    )
    assert shown in result.stdout
    for row in saved["seeds"]:
        assert f"{row['accuracy']:.1%}" in result.stdout
    page = (tmp_path / "net" / "loss.html").read_text()
    assert '"error_y":{"array":[' in page.replace(" ", "")
    assert (tmp_path / "net" / "seed-2" / "model.safetensors").is_file()


def test_the_command_line_takes_precedence_over_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "small.toml"
    config.write_text(
        '\ufeffop = "sliding_window"\ntask = "copy"\ndim = 16\nsteps = 3\nbatch = 2\nlength = 12\nvocabulary = 8\n'
        f'seeds = [1, 2]\njson = true\nout = "{tmp_path.as_posix()}/net"\n[options]\nwindow = 4\nsinks = 1\n',
        "utf-8",
    )
    result = run("train", "--config", config, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert [row["seed"] for row in json.loads(result.stdout)["seeds"]] == [1, 2]
    record = json.loads((tmp_path / "net" / "seed-1" / "training.json").read_text())
    assert record["schedule"]["steps"] == 2
    assert record["network"]["mixers"][0]["options"] == {"window": 4, "sinks": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"stps = 3", 'unknown option in bad.toml "stps"; did you mean "steps"?'),
        (b"as_json = true", 'unknown option in bad.toml "as_json"'),
        (b"steps = ", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_config_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("bad.toml").write_bytes(content)
    result = run("train", "--op", "softmax", "--config", "bad.toml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"] * (content is not None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_steps_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A signal arrives in the middle of the third step."""
    steps, original = [], Training.advance

    def advance(training: Training) -> None:
        steps.append(training.step)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        original(training)

    monkeypatch.setattr(Training, "advance", advance)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = run("train", *SMALL, "--out", tmp_path / "net")
    assert stopped.exit_code == 1
    assert f"interrupted: step 3 of 4 is kept in {tmp_path / 'net'}; run the same command to resume" in stopped.stderr
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = run("train", *SMALL, "--out", tmp_path / "net")
    assert resumed.exit_code == 0, resumed.output
    assert steps == [0, 1, 2, 3]
    whole = run("train", *SMALL, "--out", tmp_path / "whole", "--json")
    record = json.loads((tmp_path / "net" / "training.json").read_text())
    assert record["scores"]["4"] == json.loads(whole.stdout)["accuracy"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "net"):
        for args in (["train", *SMALL], ["bench", "recall", "--steps", 1]):
            second = run(*args, "--out", tmp_path / "net")
            assert second.exit_code == 2
            assert "is in use by another run" in second.stderr
    assert run("train", *SMALL, "--out", tmp_path / "net").exit_code == 0


def test_the_help_lists_operators_layers_and_tasks() -> None:
    text = " ".join(run("train", "--help").stdout.split())
    for part in listing().split("\n\n"):
        assert part in text
    assert {"softmax", "hedgehog", "mega"} <= set(re.findall(r"\w+", listing()))
    assert list(TASKS) == list(TRAINING_TASKS)
    whole = " ".join(run("--help").stdout.split())
    for part in (*listing().split("\n\n"), "niah_multikey", "razor_attention"):
        assert part in whole


def test_options_are_python_literals_or_text() -> None:
    assert parsed(None) == parsed(" ") == {}
    assert parsed("window=32, form=exp,rate=1e-3,on=True") == {"window": 32, "form": "exp", "rate": 1e-3, "on": True}
    assert parsed("sizes=(1, 2),names=[a, b]") == {"sizes": (1, 2), "names": "[a, b]"}
    with pytest.raises(OptionError, match="got '3=4'"):
        parsed("3=4")


def test_bench_recall_runs_and_refuses(tmp_path: Path) -> None:
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
    config = tmp_path / "recall.toml"
    config.write_text('steps = 2\nlength = 24\npairs = 3\nvocabulary = 32\nrates = [1e-2]\nonly = "nobody"\n')
    again = run("bench", "recall", "--config", config, "--only", "softmax; lightning", "--out", tmp_path, "--json")
    assert [point["label"] for point in json.loads(again.stdout)["points"]] == ["softmax", "lightning"]
    wrong = run("bench", "recall", "--only", "nobody", "--out", tmp_path)
    assert wrong.exit_code == 2
    assert "only=nobody must be among" in wrong.stderr
    wrong = run("bench", "recall", "--rates", "fast", "--out", tmp_path)
    assert wrong.exit_code == 2
    assert "rates='fast' must be numbers, separated by commas" in wrong.stderr
