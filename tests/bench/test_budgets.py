"""Several budgets in one run: every method at each of them, a shared prefill that changes nothing, and resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.bench.comparison import interleaved
from foveate.bench.comparison.encoding import prompts as encode
from foveate.bench.comparison.measure import batches, read_batch, run_batch
from foveate.bench.comparison.results import Comparison
from foveate.bench.comparison.run import RESULTS, compare
from foveate.bench.known import SHARING
from foveate.bench.methods import Contender
from foveate.core.errors import OptionError
from foveate.tasks.text.needle import Needle
from tests.bench.conftest import Watch, write_prompts
from tests.support.lab import lab, lab_gates, lab_host

METHODS = ["sink_recent", "snapkv", "sliding_window", "act_calibration"]


@pytest.fixture
def settings(decoder: Path, tmp_path: Path) -> dict[str, Any]:
    file = write_prompts(tmp_path / "mine.jsonl", [f"{'word ' * (20 + n)}and the key is {n}" for n in range(7)])
    return {"model": str(decoder), "task": str(file), "out": tmp_path / "out"}


def test_every_method_runs_at_every_budget(settings: dict[str, Any]) -> None:
    watch = Watch()
    found = compare(**settings, methods=METHODS, budgets=[0.5, 0.2], progress=watch)
    assert found.budgets == [0.2, 0.5] and [row.error for row in found.rows] == [""] * 8
    assert [row.id for row in found.rows] == [
        ("full", None), ("sink_recent", 0.2), ("sink_recent", 0.5), ("snapkv", 0.2), ("snapkv", 0.5),
        ("sliding_window", 0.2), ("sliding_window", 0.5), ("act_calibration", None),
    ]  # fmt: skip
    kept = {row.id: row.cache_kept for row in found.rows}
    for key in ("sink_recent", "snapkv"):
        assert kept[key, 0.2] == pytest.approx(0.2, abs=0.03) and kept[key, 0.5] == pytest.approx(0.5, abs=0.03)
    assert len(watch.labels) == watch.total == 8 * 7 and "snapkv at 0.2" in watch.labels and "full" in watch.labels
    assert [row.id for row in found.at(0.5).rows] == [
        ("full", None), ("sink_recent", 0.5), ("snapkv", 0.5), ("sliding_window", 0.5), ("act_calibration", None),
    ]  # fmt: skip
    assert Comparison.load(settings["out"] / RESULTS).to_json() == found.to_json()


def test_times_stay_paired_and_each_budget_has_prefills_of_its_own(settings: dict[str, Any]) -> None:
    full, *rows = compare(**settings, methods=["sink_recent", "snapkv"], budgets=[0.2, 0.5]).rows
    assert [answer.prefill_ms > 0 for answer in full.answers] == [True] * 7
    for row in rows:
        assert all(answer.decode_ms > 0 for answer in row.answers)
        assert [a.base_decode_ms for a in row.answers] == [a.decode_ms for a in full.answers]
        own = [math.isfinite(answer.prefill_ms) for answer in row.answers]
        shared = {0.2: [True, True, True, False, True, False, True], 0.5: [True] * 4 + [False, True, False]}
        assert own == (shared[row.budget] if row.method == "sink_recent" else [True] * 7), row.id


def test_the_same_answers_as_one_budget_at_a_time(settings: dict[str, Any], tmp_path: Path) -> None:
    def outputs(rows: Any) -> dict[Any, list[str]]:
        return {row.id: [answer.output for answer in row.answers] for row in rows}

    many = outputs(compare(**settings, methods=METHODS, budgets=[0.2, 0.5]).rows)
    for budget in (0.2, 0.5):
        one = compare(**{**settings, "out": tmp_path / f"{budget}"}, methods=METHODS, budget=budget)
        assert outputs(one.rows).items() <= many.items()


@pytest.mark.parametrize("key", [key for key in SHARING if key not in ("full", "packed")])
def test_methods_that_share_a_prefill_answer_as_after_their_own(key: str) -> None:
    model, tokenizer = lab()
    contender = Contender(key, lab_host(), 0.3)
    contender.calibrate(lambda cls, key: {"gates": lab_gates()} if key == "duo_attention" else {})
    found = encode(Needle(length=700, count=2), tokenizer, model)
    (batch,) = batches(found, 2, None, tokenizer.pad_token_id)
    own = run_batch(model, contender.at(batch.length), batch)
    shared = read_batch(model, batch)
    before = [layer.keys.clone() for layer in shared.layers]
    for _ in range(2):
        again = run_batch(model, contender.at(batch.length), batch, shared=shared)
        assert again.ids == own.ids and math.isnan(again.prefill_ms)
        assert (again.kept, again.read) == pytest.approx((own.kept, own.read), abs=2e-3)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(shared.layers, before, strict=True))


def test_prompts_of_different_length_share_a_prefill_too(decoder: Path, tmp_path: Path) -> None:
    texts = [f"{'word ' * 24}{'x' * n} the key is {n}" for n in range(10)]
    settings = {"model": str(decoder), "task": str(write_prompts(tmp_path / "mine.jsonl", texts)), "batch": 2}
    many = compare(**settings, methods=["sink_recent"], budgets=[0.2, 0.5], out=tmp_path / "many").rows[2]
    one = compare(**settings, methods=["sink_recent"], budget=0.5, out=tmp_path / "one").rows[1]
    assert any(math.isnan(answer.prefill_ms) for answer in many.answers)
    assert [answer.output for answer in many.answers] == [answer.output for answer in one.answers]


def measured(settings: dict[str, Any], **changes: Any) -> list[str]:
    watch = Watch()
    compare(**{**settings, "methods": ["sink_recent", "snapkv"], **changes}, progress=watch)
    return watch.labels


def test_a_run_of_several_budgets_resumes(settings: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(**settings, methods=["sink_recent"], budgets=[0.2, 0.5], progress=Watch(stop_at=17))
    assert len(measured(settings, methods=["sink_recent"], budgets=[0.2, 0.5])) == 21 - 15
    assert measured(settings, methods=["sink_recent"], budgets=[0.2, 0.5]) == []


def test_budgets_and_single_runs_use_each_others_answers(settings: dict[str, Any]) -> None:
    assert len(measured(settings, budget=0.2)) == 21
    assert set(measured(settings, budgets=[0.2, 0.5])) == {"sink_recent at 0.5", "snapkv at 0.5"}
    alone = measured(settings, budget=0.5)  # whose answers after a shared prefill have no time for the prompt
    assert set(alone) == {"sink_recent"} and len(alone) == 2
    assert measured(settings, budget=0.5) == []


def test_a_prompt_is_read_once_for_all_that_share_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = interleaved.read_batch
    monkeypatch.setattr(interleaved, "read_batch", lambda *given: reads.append(given) or original(*given))
    compare(**settings, methods=["sink_recent", "razor_attention", "snapkv"], budgets=[0.2, 0.3, 0.5])
    assert len(reads) == 4, "the first three prompts are read by each method"
    reads.clear()
    compare(**{**settings, "out": settings["out"] / "one"}, methods=["sink_recent"])
    compare(**{**settings, "out": settings["out"] / "two"}, methods=["snapkv"], budgets=[0.2, 0.5])
    assert reads == []


@pytest.mark.parametrize("budgets", [[], [0.2, 0.2], [0.2, 0.0], [1.5]])
def test_budgets_are_refused_by_name(settings: dict[str, Any], budgets: list[float]) -> None:
    with pytest.raises(OptionError, match="budget") as raised:
        compare(**settings, budgets=budgets)
    assert "\n" not in str(raised.value) and not settings["out"].exists()


def test_results_with_one_budget_of_an_earlier_version_load(settings: dict[str, Any]) -> None:
    found = compare(**settings, methods=["sink_recent"], budget=0.4)
    content = json.loads((settings["out"] / RESULTS).read_text())
    content["format"], content["budget"] = "foveate.comparison/2", content.pop("budgets")[0]
    for row in content["rows"]:
        del row["budget"], row["lost"], row["answer_tokens"], row["agnostic_score"]
        for answer in row["answers"]:
            del answer["answer_tokens"], answer["agnostic_output"], answer["agnostic_score"]
    assert Comparison.from_json(json.dumps(content)).to_json() == found.to_json()
    content.pop("budget")
    with pytest.raises(OptionError, match="budgets must be a list of numbers"):
        Comparison.from_json(json.dumps(content))
