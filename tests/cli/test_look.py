"""`foveate look` at the command line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from foveate.bench.comparison.encoding import encoded
from foveate.bench.loading import load
from foveate.bench.looking import look_at
from foveate.bench.looking.run import _read
from foveate.cli import app
from foveate.host.hf.model import host
from foveate.lens.lens import Lens, look
from foveate.models.base import byte_tokenizer
from tests.lens.models import eager_maps, text, tiny
from tests.support.tensors import assert_near

TEXT = "The garbage collector frees objects.\nIt runs often, é."
NAMES = ["entropy", "sink_mass", "received_mass"]


def run(*args: object):
    return CliRunner().invoke(app, ["look", *(str(arg) for arg in args)])


@pytest.fixture(scope="module")
def lab():
    model, tokenizer, _ = load(None)
    return model, torch.tensor([encoded(tokenizer, TEXT)])


def test_files_and_tables_have_the_values_of_the_lens(lab, tmp_path: Path) -> None:
    found = run(TEXT, "--out", tmp_path / "a", "--heads", "3.1, 0.2")
    assert found.exit_code == 0, found.output
    content = json.loads((tmp_path / "a" / "look.json").read_text("utf-8"))
    seen = look(*lab)
    assert content["tokens"][:4] == ["<bos>", "T", "h", "e"] and content["prompt_tokens"] == lab[1].shape[1]
    assert list(content["measures"]) == NAMES and content["roles"] is None
    for row in seen.measures():
        assert content["measures"][row["measure"]][row["layer"]][row["head"]] == pytest.approx(row["value"], rel=1e-6)
    entropy = sorted(
        (row["value"], row["layer"], row["head"]) for row in seen.measures() if row["measure"] == "entropy"
    )
    line = next(line for line in found.stdout.splitlines() if line.startswith("entropy"))
    (small, layer, head), (large, top, best) = entropy[0], entropy[-1]
    assert f"{top}.{best}\N{NO-BREAK SPACE}({large:.3g})" in line.split(",")[0]
    assert f"{layer}.{head}\N{NO-BREAK SPACE}({small:.3g})" in line
    assert {path.name for path in (tmp_path / "a").iterdir()} == {".lock", "look.html", "look.json", "look.parquet"}


def test_rows_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("foveate.bench.looking.results.find_spec", lambda name: None)
    found = run(TEXT, "--out", tmp_path, "--measure", "own_token,sink_mass", "--json")
    assert found.exit_code == 0, found.output
    with (tmp_path / "look.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    content = json.loads(found.stdout)
    assert len(rows) == 2 * 4 * 8 and not (tmp_path / "look.parquet").exists()
    for row in rows:
        value = content["measures"][row["measure"]][int(row["layer"])][int(row["head"])]
        assert float(row["value"]) == value


def test_parquet_has_the_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    content = json.loads(run(TEXT, "--out", tmp_path, "--json").stdout)
    rows = parquet.read_table(tmp_path / "look.parquet").to_pylist()
    assert len(rows) == 3 * 4 * 8
    assert all(row["value"] == content["measures"][row["measure"]][row["layer"]][row["head"]] for row in rows)


def test_every_generated_token_has_a_row(lab) -> None:
    """Measures, with the last generated token, are those of one pass over the whole text; a file is read as a text."""
    model, ids = lab
    found = look_at(None, TEXT, measures=["entropy", "received_mass", "previous_token"], heads=[(2, 1)], generate=5)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    assert found.prompt == ids.shape[1] and len(found.tokens) == whole.shape[1] == ids.shape[1] + 5
    seen = look(model, whole, measures=[measure.name for measure in found.measures])
    for measure in found.measures:
        for layer, values in seen.values(measure.name).items():
            assert_near(measure.values[layer], values[0], 1e-4, f"{measure.name}, layer {layer}")
    weights = eager_maps(model, {"input_ids": whole})[2][0, 1]
    assert found.maps[0].span == 1
    assert_near(found.maps[0].tiles, weights, 1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_generation_of_layers_with_windows(kind: str) -> None:
    """Old keys leave the cache of a window, and their columns stay; progress counts layers and tokens."""
    model, ids, steps = tiny(kind), text()["input_ids"][:1], []
    lens = Lens(["entropy", "received_mass"], keep_maps={(1, 2): slice(None)}, phase="all")
    whole = _read(host(model), lens, ids[0].tolist(), 7, lambda *step: steps.append(step))
    assert whole[: ids.shape[1]] == ids[0].tolist() and len(whole) == ids.shape[1] + 7
    assert [step for step, _, _ in steps] == list(range(1, 17)) and steps[-1][1] == 16
    assert steps[0][2] == "reading 24 tokens" and steps[-1][2] == "generating"
    seen = look(model, torch.tensor([whole]), measures=["entropy", "received_mass"], keep_maps={(1, 2): slice(None)})
    for name in ("entropy", "received_mass"):
        for layer, values in seen.values(name).items():
            assert_near(lens.values(name)[layer], values, 1e-4, f"{name}, layer {layer}")
    assert_near(lens.map(1, 2), seen.map(1, 2), 1e-4)
    assert model(torch.tensor([whole[:-1]])).logits[0, -1].argmax() == whole[-1]


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT, "utf-8")
    from_file = json.loads(run(tmp_path / "long.txt", "--out", tmp_path, "--json").stdout)
    assert from_file == json.loads(run(TEXT, "--out", tmp_path, "--json").stdout)


def test_roles_are_listed_with_reasons(tmp_path: Path) -> None:
    found = run(TEXT, "--out", tmp_path, "--roles", "--generate", 3)
    assert found.exit_code == 0, found.output
    roles = json.loads((tmp_path / "look.json").read_text("utf-8"))["roles"]
    assert {role["name"] for role in roles} >= {"previous token", "local"}
    assert all(role["score"] >= role["threshold"] and role["reason"] for role in roles)
    assert "threshold" in found.stdout and "mean weight on the token before" in found.stdout
    page = (tmp_path / "look.html").read_text("utf-8")
    assert page.count("mean weight on the last 5 tokens") == sum(role["name"] == "local" for role in roles)


def test_views_of_all_heads_are_written(tmp_path: Path) -> None:
    found = run(TEXT, "--out", tmp_path, "--views", "--generate", 2)
    assert found.exit_code == 0, found.output
    for name in ("view.html", "joint.html"):
        assert f"view     {tmp_path / name}" in found.stdout
    page = (tmp_path / "view.html").read_text("utf-8")
    data = json.loads(page.split('id="view">')[1].split("</script>")[0])
    part, content = data["parts"][0], json.loads((tmp_path / "look.json").read_text("utf-8"))
    assert part["keys"] == content["tokens"] and part["prompt"] == content["prompt_tokens"] < len(part["keys"])
    assert len(part["maps"]) == 4 * 8 and set(part["products"]) == {"0", "1", "2", "3"}
    assert (tmp_path / "joint.html").read_text("utf-8").count('"correlation_after"') == 4 * 8


def test_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "look.toml"
    config.write_text(f'measure = ["own_token"]\nheads = ["3.1"]\nout = "{tmp_path.as_posix()}/b"\njson = true\n')
    content = json.loads(run(TEXT, "--config", config).stdout)
    assert list(content["measures"]) == ["own_token"] and (tmp_path / "b" / "look.html").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["  "], "text must not be empty"),
        ([TEXT, "--measure", "entropie"], 'unknown measure "entropie"; did you mean "entropy"?'),
        ([TEXT, "--measure", ","], "must name measures"),
        ([TEXT, "--heads", "4.0"], "4.0 must be in 0.0..3.7"),
        ([TEXT, "--heads", "0.8"], "0.8 must be in 0.0..3.7"),
        ([TEXT, "--heads", "3-1"], "must be layer.head with commas, such as 3.1,5.7"),
        ([TEXT, "--generate", "-1"], "generate=-1 must be"),
        (["word " * 1800], "the model's context holds 4096"),
        ([TEXT, "--generate", "4090"], "+ 4090 tokens to generate; the model's context holds 4096"),
        (["abc", "--roles"], "roles need a text of at least 8 tokens; this one has 4"),
        (["absent.txt"], "looks like a file, but there is none"),
        ([TEXT, "--model", "absent/folder/x"], "absent/folder/x"),
        ([TEXT, "--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(args: list[str], words: str, tmp_path: Path) -> None:
    found = run(*args, "--out", tmp_path / "new")
    assert found.exit_code == 2
    line = found.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_text_is_no_folder(empty: str) -> None:
    found = run(empty)
    assert found.exit_code == 2 and "text must not be empty" in found.stderr


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found.exit_code == 2 and "is a folder; give a file or a text" in found.stderr


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NO_DECODERS = {
    "bert": lambda: BertLMHeadModel(BertConfig(vocab_size=byte_tokenizer.VOCAB, **SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=byte_tokenizer.VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("kind", NO_DECODERS)
def test_a_model_that_is_no_decoder_is_refused(kind: str, tmp_path: Path) -> None:
    NO_DECODERS[kind]().save_pretrained(tmp_path / kind)
    byte_tokenizer.build(512).save_pretrained(tmp_path / kind)
    found = run(TEXT, "--model", tmp_path / kind, "--out", tmp_path / "new")
    assert found.exit_code == 2 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert "decoder language model" in found.stderr and not (tmp_path / "new").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom foveate.cli import main\ntry: main(['look', '--help'])\n"
        "except SystemExit as done: sys.exit(done.code or bool({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--measure" in found.stdout
