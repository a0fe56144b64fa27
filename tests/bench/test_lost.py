"""What was lost: which examples are read, what was dropped on them, resuming, and the refusal of losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.bench.comparison import lost
from foveate.bench.comparison.results import Answer, Comparison, Row
from foveate.bench.comparison.run import RESULTS, compare
from foveate.core.errors import Interrupted, OptionError
from tests.bench.conftest import Watch


def row(*scores: float, **errors: str) -> Row:
    answers = [Answer("p", "e", "o", score, error=errors.get(f"at{index}", "")) for index, score in enumerate(scores)]
    return Row("m", "M", {}, answers=answers)


def test_broken_examples_are_read_and_a_few_that_were_solved() -> None:
    base = row(1, 1, 0, 1, 1, 1, 1, 1, 0.5, 1)
    own = row(0, 1, 0, 1, 0.5, 1, 1, 1, 0.0, 0, at9="failed")
    found = lost.examples_of(own, base)
    assert {index for index, solved in found.items() if not solved} == {0, 4}
    assert [index for index, solved in found.items() if solved] == [1, 3, 5, 6]
    assert lost.examples_of(row(1, 1), base) == {}


def test_the_groups_with_most_mass_come_first() -> None:
    groups, mass = torch.tensor([[1, 2], [0, 1], [1, 2], [3, 3]]), torch.tensor([0.2, 0.3, 0.25, 0.1])
    assert lost._largest(groups, mass, 2) == [[1, 2], [0, 1]]
    assert lost._largest(groups[:0], mass[:0], 2) == []


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("lost")
    return {"methods": ["sink_recent", "token_select", "hip"], "budget": 0.2, "examples": 5, "length": 500, "out": out}


@pytest.fixture(scope="module")
def found(settings: dict[str, Any]) -> Comparison:
    return compare(**settings, lost=True)


def test_a_policy_that_evicts_the_needle_had_dropped_what_was_looked_up(found: Comparison) -> None:
    """sink_recent breaks examples whose needle it dropped; token_select, which solves them, reads the needle."""
    full, sink, select, hip = found.rows
    broken = [example for example in sink.lost if not example.solved]
    assert full.lost == [] and len(broken) >= 3
    for example in broken:
        assert full.answers[example.example].score == 1 and sink.answers[example.example].score == 0
        assert example.dropped > 0.6 and example.mass > 1
        answer = full.answers[example.example].expected.strip()
        assert any(part in example.slots[0] for part in (answer[:4], answer[-4:])), "the slot is that of the needle"
        first, *_ = example.heads.values()
        assert first[0] > 0.3 and first[1] > 0.6
    assert all(example.solved for example in select.lost) and select.lost
    assert max(example.dropped for example in select.lost) < 0.1
    assert all(example.dropped == 0 for example in hip.lost), "the prompt was read sparsely, and nothing was evicted"


def test_what_was_lost_is_saved_and_not_read_again(
    settings: dict[str, Any], found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Comparison.load(settings["out"] / RESULTS).to_json() == found.to_json()
    monkeypatch.setattr(lost, "looked_up", lambda *_: pytest.fail("read again"))
    watch = Watch()
    again = compare(**settings, lost=True, progress=watch)
    assert watch.labels == [] and [each.lost for each in again.rows] == [each.lost for each in found.rows]
    assert all(not each.lost for each in compare(**settings).rows), "not asked for"


def test_an_interrupt_keeps_all_answers(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lost, "visible", stop)
    with pytest.raises(Interrupted) as raised:
        compare(**{**settings, "methods": ["sink_recent"], "budget": 0.15}, lost=True)
    assert raised.value.done == raised.value.total == 10


def test_an_unknown_share_is_saved_as_nothing(tmp_path: Path) -> None:
    example = lost.LookedUp(0, 0, 0.0, math.nan, [], {"1.2": [0.5, None]})
    rows = [row(1.0), Row("m", "M", {}, answers=row(0.0).answers, lost=[example])]
    kept = Comparison("m", "t", 0, "cpu", "float32", [0.2], 1, None, {}, rows)
    text = kept.to_json()
    assert json.loads(text)["rows"][1]["lost"][0]["dropped"] is None
    assert Comparison.from_json(text).to_json() == text


def test_a_loss_has_no_broken_examples(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="lost=True") as raised:
        compare(methods=["sink_recent"], examples=1, length=300, score="loss", lost=True, out=tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / RESULTS).exists()
