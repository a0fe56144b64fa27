"""A run reuses all results of an earlier one with the same inputs, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import LlamaForCausalLM

from foveate.bench.comparison.run import JOURNAL, RESULTS, compare
from foveate.bench.parts.folder import lock_folder
from foveate.bench.parts.journal import Journal
from foveate.core.errors import Interrupted, OptionError
from foveate.kv.parts import calibration_store
from tests.bench.conftest import Watch, write_prompts

TWO = ["sink_recent", "sliding_window"]


@pytest.fixture
def settings(own_decoder: Path, prompts: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": str(own_decoder), "task": str(prompts), "methods": TWO, "out": tmp_path / "out"}


def measured(settings: dict[str, Any], **changes: Any) -> int:
    """Return the number of answers that a run had to measure."""
    watch = Watch()
    compare(**{**settings, **changes}, progress=watch)
    assert len(watch.labels) == watch.total
    return watch.total


def test_an_interrupt_keeps_every_prompt_that_all_methods_answered(settings: dict[str, Any]) -> None:
    with pytest.raises(Interrupted) as stopped:
        compare(**settings, progress=Watch(stop_at=7))  # in the third prompt
    assert (stopped.value.done, stopped.value.total) == (6, 9)
    kept = [json.loads(line) for line in (settings["out"] / JOURNAL).read_text().splitlines()]
    assert len(kept) == 6 and not (settings["out"] / RESULTS).exists()
    watch = Watch()
    found = compare(**settings, progress=watch)
    assert watch.labels == ["sliding_window", "full", "sink_recent"]
    assert [row.answers[0].prefill_ms for row in found.rows] == [line["prefill_ms"] for line in kept[:3]]
    assert measured(settings) == 0


def test_the_same_inputs_are_not_measured_twice(settings: dict[str, Any]) -> None:
    assert measured(settings) == 9
    assert measured(settings) == 0
    assert measured(settings, methods=[*TWO, "token_select"]) == 3
    assert measured(settings, score="exact") == 0  # stored answers are scored again
    assert measured(settings, fresh=True) == 9


@pytest.mark.parametrize("change", [{"budget": 0.5}, {"dtype": "bfloat16"}, {"score": "loss"}, {"batch": 3}])
def test_other_inputs_are_measured(settings: dict[str, Any], change: dict[str, Any]) -> None:
    measured(settings)
    assert measured(settings, **change) == {"budget": 6}.get(next(iter(change)), 9)
    assert measured(settings) == 0  # and the first inputs' answers are still stored


def test_only_new_prompts_of_a_file_are_measured(settings: dict[str, Any], prompts: Path) -> None:
    measured(settings)
    with prompts.open("a") as file:
        file.write("\n" + json.dumps({"prompt": "a new one", "answer": "x"}))
    assert measured(settings) == 3
    write_prompts(prompts, ["all", "other", "prompts"])
    assert measured(settings) == 9


def test_new_weights_in_the_same_folder_are_another_model(settings: dict[str, Any], own_decoder: Path) -> None:
    first = compare(**settings)
    model = LlamaForCausalLM.from_pretrained(own_decoder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6  # a small change of a single weight
    model.save_pretrained(own_decoder)
    watch = Watch()
    second = compare(**settings, progress=watch)
    assert watch.total == 9 and first.digest != second.digest


def test_a_changed_configuration_is_another_model(settings: dict[str, Any], own_decoder: Path) -> None:
    measured(settings)
    config = json.loads((own_decoder / "config.json").read_text())
    (own_decoder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert measured(settings) == 9


def test_changed_code_and_versions_reuse_no_answers(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measured(settings)
    monkeypatch.setattr("foveate.bench.parts.digest.of_code", lambda: "other")
    assert measured(settings) == 9
    monkeypatch.setattr("foveate.bench.comparison.run._versions", lambda: {"torch": "9.9"})
    assert measured(settings) == 9


def test_earlier_rows_stay_if_fewer_methods_run(settings: dict[str, Any]) -> None:
    first = compare(**settings)
    second = compare(**{**settings, "methods": ["sliding_window"]})
    assert [row.method for row in second.rows] == ["full", "sliding_window", "sink_recent"]
    assert second.rows[2] == first.rows[1]
    third = compare(**{**settings, "methods": ["sliding_window"], "budget": 0.9})
    assert [row.method for row in third.rows] == ["full", "sliding_window"]


def test_a_method_added_later_has_its_own_baseline_times(settings: dict[str, Any]) -> None:
    compare(**{**settings, "methods": ["sliding_window"]})
    full, sink, _ = compare(**{**settings, "methods": ["sink_recent"]}).rows
    assert all(answer.base_decode_ms > 0 for answer in sink.answers)
    assert [answer.base_decode_ms for answer in sink.answers] != [answer.decode_ms for answer in full.answers]


def test_calibration_of_another_model_is_ignored(
    settings: dict[str, Any], own_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.kv import duo_attention

    calls = []

    def train(model: Any, data: Any, **options: Any) -> torch.Tensor:
        calls.append(next(iter(data))[0].shape)
        return torch.rand(3, 2)

    monkeypatch.setattr(duo_attention, "duo_train", train)
    duo = {**settings, "methods": ["duo_attention"]}
    compare(**duo)
    compare(**duo, fresh=True)
    compare(**{**duo, "dtype": "bfloat16"})  # the same model in lower precision
    assert len(calls) == 1 and (settings["out"] / "duo_attention.safetensors").exists()
    model = LlamaForCausalLM.from_pretrained(own_decoder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(own_decoder)
    compare(**duo)
    assert len(calls) == 2
    stray = own_decoder / "duo_attention.safetensors"  # the calibration of a model with other heads
    calibration_store.save({"gates": torch.ones(9, 9)}, stray, "another model")
    assert compare(**duo).rows[1].error == "" and len(calls) == 2
    stray.write_bytes(b"no safetensors")
    assert compare(**duo).rows[1].error == ""


@pytest.mark.parametrize("content", ["", "{", '{"format": "something else"}', "[1]"])
def test_a_damaged_results_file_points_to_fresh(settings: dict[str, Any], content: str) -> None:
    compare(**settings)
    (settings["out"] / RESULTS).write_text(content)
    with pytest.raises(OptionError, match=r"cannot read results .*; add --fresh to measure again") as raised:
        compare(**settings)
    assert "\n" not in str(raised.value)
    assert measured(settings, fresh=True) == 9


def test_results_of_an_earlier_version_are_overwritten(settings: dict[str, Any]) -> None:
    settings["out"].mkdir()
    (settings["out"] / RESULTS).write_text('{"format": "foveate.comparison/1", "rows": []}')
    assert measured(settings) == 9


def test_a_journal_survives_a_partial_line_and_reports_a_damaged_one(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    Journal(file).add({"a": {"ids": [1]}, "b": {"ids": [2]}})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "c", "id')
    journal = Journal(file)
    assert (journal.get("b"), journal.get("c")) == ({"ids": [2]}, None)
    journal.add({"c": {"ids": [3]}})
    assert Journal(file).get("c") == {"ids": [3]} and Journal(file).get("a") == {"ids": [1]}
    file.write_bytes(b"[]\n" + whole)
    with pytest.raises(OptionError, match=r"line 1 is damaged; add --fresh"):
        Journal(file)
    assert Journal(file, fresh=True).get("a") is None and not file.exists()


def test_a_full_disk_is_reported_and_loses_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add, calls = Journal.add, []

    def fails_later(self: Journal, records: dict[str, Any]) -> None:
        calls.append(records)
        if len(calls) == 2:
            self.file = Path("/dev/full")
        add(self, records)

    monkeypatch.setattr(Journal, "add", fails_later)
    with pytest.raises(OptionError, match=r"cannot write /dev/full: No space left on device; earlier records are kept"):
        compare(**settings)
    monkeypatch.undo()
    assert measured(settings) == 6


def test_two_runs_do_not_share_a_folder(settings: dict[str, Any]) -> None:
    settings["out"].mkdir()
    with lock_folder(settings["out"]):
        other = FileLock(settings["out"] / ".lock", timeout=0, is_singleton=False)
        assert other.is_locked is False
        with pytest.raises(OptionError, match="is in use by another run"):
            compare(**settings)
    assert measured(settings) == 9


@pytest.mark.parametrize("inside", ["", "deeper/down"])
def test_a_file_as_output_is_refused_before_loading(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inside: str
) -> None:
    monkeypatch.setattr("foveate.bench.comparison.run.load", lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / "report.html"
    file.write_text("mine")
    with pytest.raises(OptionError, match=r"out=.* a file; it must be a folder"):
        compare(**{**settings, "out": file / inside})
    assert file.read_text() == "mine"


def test_a_folder_without_permission_is_refused_before_loading(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("foveate.bench.comparison.run.load", lambda *_, **__: pytest.fail("loaded"))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with pytest.raises(OptionError, match=r"cannot be written to: Permission denied"):
        compare(**settings)
    assert not settings["out"].exists()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OptionError, match=r"cannot be created: Permission denied"):
        compare(**settings)


def test_a_failed_run_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path / "a" / "b") as folder:
        (folder / "kept").write_text("x")
    assert (tmp_path / "a" / "b" / "kept").exists()
