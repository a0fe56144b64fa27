"""Heads are identified once, kept with their model's digest, resumed, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from foveate.bench import heads
from foveate.bench.comparison.run import compare
from foveate.bench.heads import Sizes, identify
from foveate.cli import app
from foveate.core.errors import FoveateError, OptionError
from foveate.kv import DuoAttention, DuoPattern, load_duo_pattern, save_duo_pattern
from foveate.lens import copying_scores
from foveate.lens.heads.retrieval_heads import copies
from foveate.report import heads as report
from tests.support.constructed import induction_lm, recall
from tests.support.lab import lab_gates

SMALL = Sizes(length=256, items=2)


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["heads", *map(str, args)])


# -- retrieval scores --------------------------------------------------------------------------------------------------


def texts(count: int = 6, length: int = 80) -> list[tuple[Tensor, Tensor]]:
    out = []
    for seed in range(count):
        ids, answers = recall(1, length=length, answer=3, away=20, seed=seed)
        whole = torch.cat([ids, answers], 1)
        out.append((whole, torch.arange(whole.shape[1])[None] >= length))
    return out


@pytest.mark.parametrize("matching", [[(1, 2)], [(1, 0), (2, 3)]])
def test_the_heads_that_copy_are_found(matching: list[tuple[int, int]]) -> None:
    model = induction_lm(layers=3, heads=4, kv_heads=4, matching=matching)
    scores = copying_scores(model, texts())
    for layer, head in matching:
        assert scores[layer, head] == 1.0
        scores[layer, head] = 0.0
    assert scores.max() < 0.2


def test_tokens_that_the_model_gets_wrong_do_not_count() -> None:
    """A head that looks at a copy which the model does not predict gets nothing for it."""
    model, items = induction_lm(layers=2, heads=4, kv_heads=4, matching=[(1, 2)]), texts()
    said = {int(token) for ids, answers in items[:3] for token in ids[answers]}
    model.lm_head.weight.data[sorted(said)] = 0.0
    assert any(int(token) not in said for ids, answers in items for token in ids[answers])
    assert copying_scores(model, items)[1, 2] == 1.0
    with pytest.raises(OptionError, match="so that no head retrieves$"):
        copying_scores(induction_lm(layers=2, heads=4, kv_heads=4, matching=[(1, 2)], silent=[(1, 2)]), texts())


def test_copies_are_found_whole() -> None:
    ids = torch.tensor([9, 1, 2, 3, 9, 1, 5, 9, 1, 2, 3, 1, 9])
    answers = torch.zeros(13, dtype=torch.bool)
    answers[8:11] = answers[12] = True
    queries, keys = copies(ids, answers)
    assert queries.tolist() == [7, 8, 9, 11] and keys.tolist() == [1, 2, 3, 7]
    answers[:] = False
    answers[6] = True
    assert copies(ids, answers)[0].numel() == 0


# -- published patterns ------------------------------------------------------------------------------------------------


def test_a_published_pattern_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(
        "1.000000000000000000e+00\t-2.5e-01\n1.3e+00\t5.000000000000000000e-01\n", "utf-8"
    )
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 256, "lr": 0.02}', "utf-8")
    found = load_duo_pattern(tmp_path)
    assert found.gates.tolist() == [[1.0, 0.0], [1.0, 0.5]] and (found.sink, found.recent) == (128, 256)
    assert DuoAttention(found.gates, sparsity=0.5, sink=found.sink, recent=found.recent).recent == 256
    again = load_duo_pattern(save_duo_pattern(DuoPattern(torch.rand(3, 4), 4, 64), tmp_path / "more"))
    assert again.gates.shape == (3, 4) and (again.sink, again.recent) == (4, 64)


@pytest.mark.parametrize(
    "table, sizes, match",
    [
        (None, None, "full_attention_heads.tsv cannot be read: No such file"),
        ("1\t2\n1", "{}", "must have a line for each layer, with equally many"),
        ("1\tx", "{}", "line 1 must hold numbers"),
        ("1\tnan", "{}", "must hold finite numbers"),
        ("", "{}", "must have a line for each layer"),
        ("1\t1", None, "config.json cannot be read"),
        ("1\t1", "[", "config.json is not JSON"),
        ("1\t1", '{"sink_size": 4}', "must hold sink_size and recent_size, whole numbers; got 4 and None"),
    ],
)
def test_a_malformed_pattern_is_refused(tmp_path: Path, table: str | None, sizes: str | None, match: str) -> None:
    for name, content in (("full_attention_heads.tsv", table), ("config.json", sizes)):
        if content is not None:
            (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(OptionError, match=match):
        load_duo_pattern(tmp_path)


# -- the work ----------------------------------------------------------------------------------------------------------


def test_each_method_finds_tables_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PROBE", 32)
    for method, names in (("razor", ["echo", "induction"]), ("retrieval", ["retrieval"]), ("moa", ["span"])):
        found = identify(None, method, tmp_path, sizes=SMALL)
        assert list(found.tables) == names and found.layers == [0, 1, 2, 3]
        width = 8 if found.kind == "query heads" else 4
        assert all(table.shape == (4, width) for table in found.tables.values())
        assert found.file.is_file() and found.seconds > 0
        again = identify(None, method, tmp_path, sizes=SMALL)
        assert again.seconds == 0
        assert all(torch.equal(again.tables[name], found.tables[name]) for name in names)
    assert not list(tmp_path.glob("*.partial.*"))


def test_a_file_of_another_model_is_not_taken(tmp_path: Path) -> None:
    save_file({"scores": torch.ones(4, 8)}, tmp_path / "retrieval_heads.safetensors", {"model": "another"})
    found = identify(None, "retrieval", tmp_path, sizes=SMALL)
    assert found.seconds > 0 and not torch.equal(found.tables["retrieval"], torch.ones(4, 8))


@pytest.mark.parametrize("method", ["duo", "moa"])
def test_an_interrupted_run_resumes(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = identify(None, method, tmp_path / "whole", sizes=SMALL)
    seen: list[int] = []

    def stop(step: int, steps: int, note: str) -> None:
        seen.append(step)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        identify(None, method, tmp_path / "parts", sizes=SMALL, progress=stop)
    assert list((tmp_path / "parts").glob("*.partial.safetensors"))
    done, calls = seen.copy(), []
    original = heads.span_influence
    monkeypatch.setattr(heads, "span_influence", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    found = identify(None, method, tmp_path / "parts", sizes=SMALL, progress=stop)
    assert len(calls) == (3 if method == "moa" else 0)
    assert not list((tmp_path / "parts").glob("*.partial.safetensors"))
    assert done == [1] and (seen[1:] == [2] if method == "duo" else seen[-1] == 4)
    for name, table in whole.tables.items():
        assert torch.equal(found.tables[name], table)


def test_compare_uses_what_was_found(tmp_path: Path) -> None:
    """A pattern in the published format, of the lab's own gates, is kept for `compare` in the same folder."""
    pattern = save_duo_pattern(DuoPattern(1 - lab_gates(), 4, 64), tmp_path / "pattern")
    found = identify(None, "duo", tmp_path / "out", pattern=pattern)
    assert torch.equal(load_file(found.file)["gates"], (1 - lab_gates()).double().float())
    seen: list[str] = []
    compare(
        model=None, task="needle", methods=["duo_attention"], budget=0.35, examples=1, length=256,
        out=tmp_path / "out", progress=_Says(seen),
    )  # fmt: skip
    assert not any("calibrating" in text for text in seen)


class _Says:
    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def start(self, total: int) -> None: ...
    def advance(self, label: str = "") -> None: ...

    def say(self, label: str) -> None:
        self.seen.append(label)


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    other = save_duo_pattern(DuoPattern(torch.rand(3, 4), 4, 64), tmp_path / "other")
    for args, match in (
        (["--method", "best"], "method='best' must be one of duo, razor, moa, retrieval"),
        (["--method", "moa", "--pattern", other], "use it with method=duo"),
        (["--pattern", other], "pattern must be (layers, kv_heads)=(4, 4) for this model; got (3, 4)"),
        (["--pattern", tmp_path / "none"], "cannot be read"),
        (["--length", 10], "length=10 must be a whole number, at least 256"),
        (["--model", tmp_path / "nothing"], "nothing"),
    ):
        result = run(*args, "--out", tmp_path / "out")
        assert result.exit_code == 2 and match in " ".join(result.stderr.split()), (args, result.stderr)
        assert result.stderr.count("\n") == 1
    with pytest.raises(FoveateError):
        identify(None, "duo", tmp_path / "out", sizes=Sizes(items=0))


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_command_shows_a_table_and_draws_a_picture(tmp_path: Path) -> None:
    args = ("--method", "retrieval", "--out", tmp_path, "--items", 2, "--length", 256)
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "layer  query heads  mean" in result.stdout and "highest: 3." in result.stdout
    assert f"heads    {tmp_path / 'retrieval_heads.safetensors'} (found in" in " ".join(result.stdout.split("\n"))
    page = (tmp_path / "retrieval.html").read_text("utf-8")
    assert "Heads of lab lm by retrieval" in page and "heatmap" in page
    again = run(*args, "--json")
    told = json.loads(again.stdout)
    assert told["seconds"] == 0 and len(told["tables"]["retrieval"]) == 4 and told["heads"] == "query heads"


def test_names_are_escaped_and_shades_follow_the_numbers(tmp_path: Path) -> None:
    table = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    found = heads.Heads("duo", "<b>x</b>", {"gate": table}, {"gate": "a<b"}, [3, 5], "key/value heads", tmp_path, 1.0)
    page = report.page(found, tmp_path / "page.html").read_text("utf-8")
    assert "<b>x</b>" not in page and "a<b" not in page
    head, shown, best, _ = report.lines(found)
    assert head == "gate: a<b; █ is 1"
    assert [str(cell) for cell in shown.columns[1].cells] == ["| █|", "|▒░|"]
    assert best == "highest: 3.1 1, 5.0 0.5, 5.1 0.25, 3.0 0"
