"""`foveate look --data`: means over the texts of a file, which an interrupted or killed run goes on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foveate.bench.comparison.encoding import encoded
from foveate.bench.loading import load
from foveate.bench.looking import Data, data as data_module, look_at_data
from foveate.bench.looking.state import FILE, State
from foveate.bench.looking.texts import batches
from foveate.cli import app
from foveate.lens import look_over
from foveate.lens.lens import look
from foveate.lens.survey import Survey
from tests.support.tensors import assert_near

TEXTS = [
    "The garbage collector frees objects.\nIt runs often, é.",
    "A list is a list is a list of lists.",
    "def add(a, b):\n    return a + b\n",
    "Sinks take what no other token wants.",
    "One two three, one two three, one two three.",
    "The last of the texts is a little longer than the others were, so that batches are padded.",
    "short",
]
MEASURES = "entropy,received_mass,induction"


def run(*args: object):
    return CliRunner().invoke(app, ["look", *(str(arg) for arg in args)])


def written(folder: Path, texts: list[str] = TEXTS, field: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), "utf-8")
    return file


@pytest.fixture(scope="module")
def survey() -> Survey:
    """The same by hand: every text alone, without padding."""
    model, tokenizer, _ = load(None)
    return look_over(model, [torch.tensor([encoded(tokenizer, text)]) for text in TEXTS], measures=MEASURES.split(","))


def check(content: dict[str, Any], survey: Survey, tolerance: float = 1e-5) -> None:
    for number, name in enumerate(survey.names):
        assert_near(torch.tensor(content["measures"][name]).double(), survey.value[number], tolerance, name)
        assert_near(torch.tensor(content["spread"][name]).double(), survey.spread[number], tolerance, name)


@pytest.mark.parametrize("batch", [1, 3])
def test_files_hold_means_over_texts(batch: int, survey: Survey, tmp_path: Path) -> None:
    file = written(tmp_path / "in")
    found = run("--data", file, "--measure", MEASURES, "--batch", batch, "--out", tmp_path / "out", "--heads", "1.2")
    assert found.exit_code == 0, found.output
    content = json.loads((tmp_path / "out" / "look.json").read_text("utf-8"))
    check(content, survey)
    assert content["texts"] == 7 and content["data"] == str(file) and content["notes"] == []
    assert content["counted"]["induction"][0][0] < 7, "a text without a token that comes twice counts for no induction"
    low, high = (torch.tensor(content[name]["entropy"]).double() for name in ("low", "high"))
    assert_near(low, survey.interval()[0][0], 1e-4)
    assert_near(high, survey.interval()[1][0], 1e-4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "look.html", "look.json", "look.parquet"}
    assert "7 texts of" in found.stdout and "±" in found.stdout and "mean over texts" in found.stdout
    page = (tmp_path / "out" / "look.html").read_text("utf-8")
    assert "heads over 7 texts" in page and "that of the first text" in page
    shown = json.loads(page.split('id="look">')[1].split("</script>")[0])
    assert "".join(shown["tokens"][1:]).startswith("The garbage") and len(shown["maps"]) == 1
    assert_near(torch.tensor(shown["measures"][0]["spread"]).double(), survey.spread[0], 1e-4)


def test_the_first_text_is_shown_with_its_own_values(tmp_path: Path) -> None:
    found = look_at_data(
        None, Data(str(written(tmp_path))), tmp_path, measures=["entropy", "next_logit"], heads=[(0, 1)]
    )
    model, tokenizer, _ = load(None)
    ids = torch.tensor([encoded(tokenizer, TEXTS[0])])
    seen = look(model, ids, measures=["entropy"], keep_maps={(0, 1): slice(None)})
    assert_near(found.measures[0].values[2], seen.values("entropy")[2][0], 1e-5)
    assert_near(found.maps[0].tiles, seen.map(0, 1)[0], 1e-5)
    assert found.measures[1].values[..., -1].isnan().all() and found.measures[1].table.isfinite().all()


def test_parquet_has_the_intervals(survey: Survey, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("--data", written(tmp_path), "--measure", MEASURES, "--out", tmp_path, "--json").exit_code == 0
    rows = parquet.read_table(tmp_path / "look.parquet").to_pylist()
    assert len(rows) == 3 * 4 * 8 and list(rows[0]) == [
        "model", "layer", "head", "measure", "value", "spread", "low", "high", "texts",
    ]  # fmt: skip
    for row in rows:
        number = survey.names.index(row["measure"])
        assert row["value"] == pytest.approx(survey.value[number, row["layer"], row["head"]].item(), abs=1e-5)
        assert row["texts"] == int(survey.count[number, row["layer"], row["head"]])


def stopping(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the middle of a batch."""
    own, calls = data_module.surveys, []

    def surveys(*args: Any, **options: Any):
        for found in own(*args, **options):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(found)
            yield found

    monkeypatch.setattr(data_module, "surveys", surveys)


def test_an_interrupted_run_goes_on(survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--data", written(tmp_path / "in"), "--measure", MEASURES, "--batch", 2, "--out", tmp_path / "out"]
    whole = json.loads(run(*command, "--json").stdout)
    with monkeypatch.context() as patch:
        stopping(2, patch)
        found = run(*command)
    assert found.exit_code == 1
    assert f"interrupted: 4 of 7 texts are measured and kept in {tmp_path / 'out'}; run the same" in found.stderr
    assert (tmp_path / "out" / FILE).exists()
    read: list[int] = []
    own = data_module.padded
    monkeypatch.setattr(data_module, "padded", lambda ids, device: (read.append(len(ids)), own(ids, device))[1])
    again = run(*command, "--json")
    assert again.exit_code == 0, again.output
    assert read == [2, 1], "only what was left is read"
    assert json.loads(again.stdout) == whole, "the very same numbers"
    assert not (tmp_path / "out" / FILE).exists()
    check(whole, survey)


def test_an_interrupt_before_the_first_batch_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping(0, monkeypatch)
    found = run("--data", written(tmp_path / "in"), "--out", tmp_path / "out")
    assert found.exit_code == 1 and "interrupted before any text was measured" in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--measure", "entropy"], "another list of measures"),
        (["--batch", "3"], "another batch size"),
        (["--dtype", "bfloat16"], "another model and another dtype"),
        (["--texts", "5"], "another file, field or number of texts"),
        (["--length", "9"], "another file, field or number of texts"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    change: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--data", written(tmp_path / "in"), "--measure", MEASURES, "--batch", "2", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stopping(2, patch)
        assert run(*command).exit_code == 1
    before = (tmp_path / "out" / FILE).read_bytes()
    found = run(*command, *change)
    assert found.exit_code == 2 and found.stderr.count("\n") == 1
    assert f"is an unfinished run with {words}; add --fresh to begin again" in found.stderr
    assert (tmp_path / "out" / FILE).read_bytes() == before
    assert run(*command, *change, "--fresh", "--json").exit_code == 0


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in (b"", b"not a safetensors file at all", b"\x08\0\0\0\0\0\0\0{}      "):
        (tmp_path / "out" / FILE).write_bytes(content)
        found = run("--data", written(tmp_path / "in"), "--out", tmp_path / "out")
        assert found.exit_code == 2 and "is damaged; add --fresh" in found.stderr and found.stderr.count("\n") == 1


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    survey = Survey.empty(["entropy"], 2, 3).with_texts(torch.rand(1, 5, 2, 3, dtype=torch.float64))
    State(tmp_path, {"model": "x"}).save(survey, 7)
    found, done = State(tmp_path, {"model": "x"}).load()
    assert found is not None and done == 7 and found.texts == 5 and found.names == ("entropy",)
    for name in ("count", "mean", "squares"):
        assert torch.equal(getattr(found, name), getattr(survey, name))
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "no draft is left"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL loses no more than the last seconds: the state is written while the run goes on."""
    file = written(tmp_path / "in", [f"{text} {number}" * 8 for number in range(400) for text in TEXTS])
    command = ["--data", file, "--measure", "entropy", "--batch", "1", "--out", tmp_path / "out"]
    code = "from foveate.bench.looking import data; data._EVERY = 0.2; from foveate.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "look", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    state, until = tmp_path / "out" / FILE, time.monotonic() + 120
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and state.exists()
    assert [path.name for path in state.parent.iterdir() if path.suffix == ".tmp"] in (
        [],
        [f".{FILE}.{process.pid}.tmp"],
    )
    done = int(json.loads(_metadata(state)["progress"])["texts"])
    assert 0 < done < 2800
    found = run("--data", file, "--measure", "entropy", "--batch", "1", "--out", tmp_path / "out", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["texts"] == 2800


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_fields_and_other_files(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("title,body\nFirst,One text\nSecond,Another text\n", "utf-8")
    found = run("--data", rows, "--field", "{title}: {body}", "--out", tmp_path / "a", "--json")
    assert found.exit_code == 0, found.output
    assert "".join(json.loads(found.stdout)["tokens"][1:]) == "First: One text"
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(["One text", "Another text"]), "utf-8")
    assert json.loads(run("--data", listed, "--out", tmp_path / "b", "--json").stdout)["texts"] == 2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "A question?", "answer": "yes"}) + "\n", "utf-8")
    assert json.loads(run("--data", prompts, "--out", tmp_path / "c", "--json").stdout)["texts"] == 1


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    file = written(tmp_path, [" ", "x" * 5000, "short", ""])
    found = run("--data", file, "--length", 100, "--measure", "entropy", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "2 rows without a text left out" in found.stdout and "1 text cut to 100 tokens" in found.stdout
    assert "rows without a text left out" in (tmp_path / "out" / "look.html").read_text("utf-8")


def test_batches_hold_neighbours_of_about_the_same_length() -> None:
    lengths = [9, 1, 8, 2, 7, 3] * 20
    found = batches(lengths, 3)
    assert sorted(number for batch in found for number in batch) == list(range(120))
    assert sum(max(lengths[i] for i in batch) * len(batch) for batch in found) < 1.2 * sum(lengths)
    assert all(max(batch) - min(batch) < 3 * 16 for batch in found)
    assert batches([5], 4) == [[0]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a text, a file of one, or --data"),
        (["a text", "--data", "FILE"], "TEXT goes with one text"),
        (["--data", "FILE", "--generate", "3"], "--generate goes with one text"),
        (["--data", "FILE", "--roles"], "--roles goes with one text"),
        (["--data", "FILE", "--spans", "a=0:2"], "--spans goes with one text"),
        (["--data", "FILE", "--batch", "0"], "batch=0 must be"),
        (["--data", "FILE", "--texts", "0"], "texts=0 must be"),
        (["--data", "FILE", "--field", "body"], "has no field 'body'"),
        (["--data", "FILE", "--measure", "entropie"], "unknown measure"),
        (["--data", "FILE", "--heads", "9.0"], "9.0 must be in 0.0..3.7"),
        (["--data", "absent.jsonl"], "data='absent.jsonl' cannot be read"),
        (["--data", "texts.txt"], "data='texts.txt' must end in one of .jsonl"),
        (["--data", "EMPTY"], "holds no text"),
        (["--data", "OTHER"], "line 1 has a, b; it must have text, or --field must name"),
        (["--data", "NUMBER"], "line 2: text must be text; got 5"),
        (["a text", "--spans", "a=0:2,b=1:3"], "overlap"),
        (["a text", "--spans", "a=0:99"], "must lie within the text, which has 7 tokens"),
        (["a text", "--spans", "a:0:99"], "must be name=start:stop with commas"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(args: list[str], words: str, tmp_path: Path) -> None:
    files = tmp_path / "in"
    known = {"FILE": written(files), "EMPTY": files / "empty.jsonl", "OTHER": files / "other.jsonl"}
    known["EMPTY"].write_text('{"text": ""}\n', "utf-8")
    known["OTHER"].write_text('{"a": 1, "b": 2}\n', "utf-8")
    known["NUMBER"] = files / "number.jsonl"
    known["NUMBER"].write_text('{"text": "a"}\n{"text": 5}\n', "utf-8")
    found = run(*(known.get(arg, arg) for arg in args), "--out", tmp_path / "new")
    assert found.exit_code == 2, found.output
    line = found.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "new").exists()


def test_spans_of_one_text(tmp_path: Path) -> None:
    found = run("A list is a list.", "--spans", "first=1:7, rest=7:18", "--out", tmp_path, "--json")
    assert found.exit_code == 0, found.output
    measures = json.loads(found.stdout)["measures"]
    assert list(measures)[3:] == ["first->first", "first->rest", "rest->first", "rest->rest"]
    table = {name: torch.tensor(values) for name, values in measures.items()}
    assert not table["first->rest"].any(), "nothing is seen before it is read"
    assert ((table["rest->first"] + table["rest->rest"]) <= 1 + 1e-5).all() and table["rest->first"].max() > 0.1
