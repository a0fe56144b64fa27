"""The command line: arguments, output and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import foveate
from foveate.bench.comparison.results import Answer, Comparison, Row
from foveate.cli import app
from foveate.core import catalog
from foveate.core.catalog import System, Taxonomy
from foveate.core.catalog_rows import Shelf
from foveate.core.errors import Interrupted, OptionError
from foveate.labs import LABS, Lab


def run(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def comparison() -> Comparison:
    def row(method: str, score: float, kept: float) -> Row:
        answers = [Answer("Where?", "here", "here", score, 9, kept, kept, 12.0, 3.0, 12.0, 3.0)]
        return Row(method, method.title(), {}, score, kept, kept, 12.0, 3.0, 40.0, 30.0, 50.0, answers)

    run = {"model": "lab", "task": "needle", "seed": 0, "device": "cpu", "dtype": "float32", "versions": {"torch": "2"}}
    rows = [row("full", 1.0, 1.0), row("duo_attention", 0.5, 0.35)]
    return Comparison(**run, budgets=[0.35], examples=1, length=512, rows=rows)


class FakeCompare:
    """Replaces `compare`: records its arguments, then returns or raises."""

    def __init__(self) -> None:
        self.raises: BaseException | None = None
        self.given: dict = {}

    def __call__(self, *, progress, out: Path, **given) -> Comparison:
        self.given = {**given, "out": out}
        progress.start(2)
        progress.advance("[red]not markup")
        if self.raises is not None:
            raise self.raises
        comparison().save(out / "results.json")
        return comparison()


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> FakeCompare:
    fake, module = FakeCompare(), ModuleType("foveate.bench.comparison.run")
    module.compare = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foveate.bench.comparison.run", module)
    return fake


def test_version_and_help() -> None:
    assert run("--version").output == f"foveate {foveate.__version__}\n"
    result = run("--help")
    assert result.exit_code == 0
    for name in ("compare", "systems", "labs"):
        assert name in result.output


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["systems"], ["systems", "--json"], ["labs"], ["compare", "-h"]]
)
def test_some_commands_run_without_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom foveate.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: sys.exit(done.code or bool({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code, *args], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_module_runs_as_a_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "foveate", "systems", "nothing_like_it"], check=False, capture_output=True
    )
    assert found.returncode == 2
    assert found.stderr.startswith(b'error: unknown system "nothing_like_it"')
    assert found.stderr.count(b"\n") == 1
    assert found.stdout == b""


@pytest.mark.parametrize(
    "args", [["no-such-command"], ["compare", "--budget", "much"], ["compare", "--no-such-option"], ["labs", "train"]]
)
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    assert run(*args).exit_code == 2


def test_compare_passes_all_options(compare: FakeCompare, tmp_path: Path) -> None:
    options = (
        "--model some/model --task t.jsonl --methods full,duo_attention,,  --budget 0.2 --examples 3 --length 300 "
        "--budgets 0.1,0.5 --seed 7 --device cuda --dtype bfloat16 --fresh --trust-remote-code --score exact --batch 2 "
        "--prompt-field doc.q --answer-field a --chat --new-tokens 9 --renumber --lost "
        "--query aware --turns multi-request"
    ).split()
    result = run("compare", *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert compare.given == {
        "model": "some/model",
        "task": "t.jsonl",
        "methods": ["full", "duo_attention"],
        "budget": 0.2,
        "budgets": [0.1, 0.5],
        "examples": 3,
        "length": 300,
        "score": "exact",
        "batch": 2,
        "seed": 7,
        "device": "cuda",
        "dtype": "bfloat16",
        "trust_remote_code": True,
        "prompt_field": "doc.q",
        "answer_field": "a",
        "chat": True,
        "new_tokens": 9,
        "renumber": True,
        "query": "aware",
        "turns": "multi-request",
        "lost": True,
        "fresh": True,
        "out": tmp_path,
    }


def test_a_comparison_prints_as_the_command_does(compare: FakeCompare, tmp_path: Path) -> None:
    printed = [line.rstrip() for line in run("compare", "--out", tmp_path).stdout.splitlines()]
    lines = str(comparison()).splitlines()
    assert len(lines) > 4 and printed[: len(lines)] == lines


def test_compare_reads_a_config_file(compare: FakeCompare, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('methods = ["sink_recent", "packed"]\nbudget = 0.2\nnew_tokens = 3\nrenumber = true\n', "utf-8")
    result = run("compare", "--config", config, "--budget", 0.3, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    given = [compare.given[name] for name in ("methods", "budget", "new_tokens", "renumber")]
    assert given == [["sink_recent", "packed"], 0.3, 3, True]


def test_a_config_file_may_name_several_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, given = tmp_path / "p.toml", []

    def fake(models: list[str], *_: object, **__: object) -> dict:
        given.extend(models)
        raise OptionError("enough")

    monkeypatch.setattr("foveate.bench.policies.run.run", fake)
    config.write_text('model = ["a", "b"]\nquick = true\n', "utf-8")
    assert run("bench", "policies", "--config", config).exit_code == 2
    assert given == ["a", "b"]


def test_compare_defaults(compare: FakeCompare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("compare").exit_code == 0
    assert compare.given["out"] == Path("foveate-compare")
    assert compare.given["budget"] == 0.35
    unset = [name for name, value in compare.given.items() if value is None]
    assert unset == [
        "model", "task", "methods", "budgets", "examples", "length", "score", "prompt_field", "answer_field",
        "new_tokens", "turns",
    ]  # fmt: skip


def test_compare_prints_a_table_and_the_files(compare: FakeCompare, tmp_path: Path) -> None:
    result = run("compare", "--out", tmp_path)
    assert result.exit_code == 0
    assert "duo_attention" in result.stdout.lower().replace(" ", "_")
    for name in ("report.html", "results.json"):
        assert (tmp_path / name).is_file()
        assert name in result.stdout


def test_compare_json_is_the_only_output(compare: FakeCompare, tmp_path: Path) -> None:
    result = run("compare", "--json", "--out", tmp_path)
    assert Comparison.from_json(result.stdout) == comparison()
    assert (tmp_path / "report.html").is_file()


def test_an_interrupt_reports_the_kept_answers(compare: FakeCompare, tmp_path: Path) -> None:
    compare.raises = Interrupted(3, 7)
    result = run("compare", "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.strip().endswith(
        f"interrupted: 3 of 7 answers are kept in {tmp_path}; run the same command to resume"
    )
    assert not (tmp_path / "report.html").exists()


def test_sigterm_is_handled_like_ctrl_c(compare: FakeCompare, tmp_path: Path) -> None:
    class Terminates(FakeCompare):
        def __call__(self, **given: object) -> Comparison:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise Interrupted(1, 2) from None
            raise AssertionError("not interrupted")

    sys.modules["foveate.bench.comparison.run"].compare = Terminates()  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGTERM)
    result = run("compare", "--out", tmp_path)
    assert (result.exit_code, signal.getsignal(signal.SIGTERM)) == (1, before)
    assert "interrupted: 1 of 2 answers are kept" in result.stderr


def test_help_lists_methods_tasks_and_scores() -> None:
    shown = " ".join(run("compare", "--help").output.replace("│", " ").split())
    for name in ("sink_recent", "act_calibration", "sliding_window", "needle", "mqar", "first-number", "rouge", "loss"):
        assert name in shown
    assert not re.search(r"(?<![a-z_])efficient_attention", shown)  # it is not causal and cannot read a prompt


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), Interrupted(0, 7)])
def test_an_interrupt_before_the_first_answer_is_reported(
    stopped: KeyboardInterrupt, compare: FakeCompare, tmp_path: Path
) -> None:
    compare.raises = stopped
    result = run("compare", "--out", tmp_path)
    assert result.exit_code == 1
    assert "interrupted before any of the answers was finished" in result.stderr and "kept" not in result.stderr


def test_compare_refuses_in_one_line(compare: FakeCompare, tmp_path: Path) -> None:
    compare.raises = OptionError("budget=3.0 must be in\n(0, 1]")
    result = run("compare", "--budget", 3, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1] == "error: budget=3.0 must be in (0, 1]"
    assert result.stdout == ""


def test_compare_shows_bugs_as_bugs(compare: FakeCompare, tmp_path: Path) -> None:
    compare.raises = ZeroDivisionError()
    result = run("compare", "--out", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_compare_needs_a_method(compare: FakeCompare) -> None:
    result = run("compare", "--methods", " , ")
    assert result.exit_code == 2
    assert 'methods=" , " must name keys' in result.stderr
    assert compare.given == {}


@pytest.fixture
def two_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        System(
            key="bar_like",
            title="[bold]A Title[/bold] in brackets",
            authors=("Ada Lovelace",),
            year=2024,
            arxiv="2405.12345",
            room="kv",
            object="foveate.cli.console:Bar",
            test="tests/cli/test_cli.py",
            tags=("policy", "cheap"),
            taxonomy=Taxonomy(positions=("local",)),
            example="with Bar('x') as bar:\n    bar.start(3)",
        ),
        System(
            "needles",
            "Needles",
            (),
            2023,
            "",
            "tasks",
            "foveate.tasks.text.needle:Needle",
            "tests/x.py",
            ("retrieval",),
            Taxonomy(),
        ),
    )
    monkeypatch.setattr(catalog, "_by_key", lambda: {row.key: row for row in rows})
    monkeypatch.setattr(catalog, "shelf", lambda room: Shelf(tuple(row for row in rows if row.room == room)))


@pytest.mark.usefixtures("two_systems")
def test_systems_prints_a_table_and_filters() -> None:
    everything = run("systems")
    assert "[bold]A Title[/bold] in brackets" in everything.stdout
    assert "needles" in everything.stdout
    assert "2 systems" in everything.stdout
    assert "1 system;" in run("systems", "--room", "kv").stdout
    assert "bar_like" not in run("systems", "--tag", "retrieval").stdout
    wrong = run("systems", "--room", "cellar")
    assert wrong.exit_code == 2
    assert "unknown room" in wrong.stderr


def test_systems_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.bench.parts.printed.PIPE_WIDTH", 80)
    lines = run("systems").stdout.splitlines()
    assert lines[0].split() == ["key", "year", "room", "title"] and max(map(len, lines)) <= 80
    first = [line for line in lines[1:] if line[:1].strip() and " 20" in line]
    assert len(first) >= 60 and all(len(line[45:].split()) > 1 for line in first[:20]), "titles have room"
    monkeypatch.setattr("foveate.bench.parts.printed.PIPE_WIDTH", 120)
    assert "streams" in run("systems").stdout.splitlines()[0]


@pytest.mark.usefixtures("two_systems")
def test_systems_prints_json() -> None:
    keys = [row["key"] for row in json.loads(run("systems", "--json").stdout)]
    assert keys == ["bar_like", "needles"]
    card = json.loads(run("systems", "needles", "--json").stdout)
    assert card["doc"].startswith("Retrieve one of several facts")
    assert card["options"][0] == "length: int = 1024"


@pytest.mark.usefixtures("two_systems")
def test_systems_prints_a_card() -> None:
    shown = run("systems", "bar_like").stdout
    for part in (
        "[bold]A Title[/bold] in brackets (2024)",
        "https://arxiv.org/abs/2405.12345",
        "foveate.cli.console:Bar",
        "policy, cheap",
        "A progress bar on stderr",
        "label: str",
        "    bar.start(3)",
    ):
        assert part in shown


@pytest.fixture
def labs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in list(LABS):
        monkeypatch.delitem(LABS, name)
    monkeypatch.setitem(LABS, "toy", Lab("toy", "a toy", "needle", tmp_path))
    return tmp_path


def weights(path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(60))


def test_labs_lists_present_checkpoints(labs: Path) -> None:
    assert "missing" in run("labs").stdout
    weights(labs / "model.safetensors")
    (row,) = json.loads(run("labs", "list", "--json").stdout)
    assert row["parameters"] == 15
    assert row["bytes"] == (labs / "model.safetensors").stat().st_size
    assert run("labs", "--json").stdout == run("labs", "list", "--json").stdout
    assert "missing" not in run("labs", "list").stdout


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]"])
def test_labs_refuses_a_damaged_checkpoint(labs: Path, content: bytes) -> None:
    (labs / "model.safetensors").write_bytes(content)
    result = run("labs")
    assert result.exit_code == 2
    assert "is not a safetensors file" in result.stderr


def test_labs_train_writes_a_checkpoint(labs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict = {}

    def train(*, out: Path, seed: int | None, progress) -> dict:
        given.update(out=out, seed=seed)
        progress(1, 2, "context 256")
        out.mkdir(parents=True, exist_ok=True)
        weights(out / "model.safetensors")
        return {"needle 256": 0.98, "stages": [1, 2]}

    module = ModuleType("foveate.labs.toy")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foveate.labs.toy", module)
    out = tmp_path / "made"
    result = run("labs", "train", "toy", "--out", out, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert given == {"out": out, "seed": 3}
    assert "needle 256: 0.98" in result.stdout
    again = run("labs", "train", "toy", "--out", out)
    assert again.exit_code == 2
    assert "already holds a checkpoint" in again.stderr
    assert run("labs", "train", "toy", "--out", out, "--fresh").exit_code == 0
    assert given["seed"] is None


def test_labs_train_can_be_interrupted(labs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(**_: object) -> dict:
        raise KeyboardInterrupt

    module = ModuleType("foveate.labs.toy")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foveate.labs.toy", module)
    result = run("labs", "train", "toy", "--out", tmp_path / "made")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("interrupted")


@pytest.mark.usefixtures("labs")
def test_labs_train_refuses_unknown_names() -> None:
    result = run("labs", "train", "toyy")
    assert result.exit_code == 2
    assert 'unknown lab "toyy"; did you mean "toy"?' in result.stderr
