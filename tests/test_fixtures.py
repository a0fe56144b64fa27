"""The fixtures that other tests lean on: a wrong claim fails, a right one is recorded, fresh memory is poisoned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from foveate.core.catalog import System, Taxonomy
from foveate.ops.base.kv_state import KVState
from tests.support import claims

NAMES = {"statement": "x beats y", "baseline_name": "y"}


def row(key: str, room: str = "ops", arxiv: str = "2401.00001") -> System:
    return System(key, f"On {key}", (), 2024, arxiv, room, f"foveate.{room}.x:X", "tests/x.py", (), Taxonomy())


@pytest.mark.parametrize(
    ("ours", "baseline", "better", "margin"),
    [
        (1.0, 2.0, "higher", 0.0),
        (2.0, 1.0, "lower", 0.0),
        (1.0, 1.0, "higher", 0.0),
        (1.4, 1.0, "higher", 0.5),
        (math.nan, 1.0, "higher", 0.0),
        (1.0, math.nan, "lower", 0.0),
    ],
)
def test_a_claim_in_the_wrong_direction_fails(claim, monkeypatch, tmp_path, ours, baseline, better, margin) -> None:
    monkeypatch.setenv(claims.VARIABLE, str(tmp_path))
    with pytest.raises(AssertionError, match="x beats y"):
        claim(**NAMES, ours=ours, baseline=baseline, better=better, margin=margin)
    assert not list(tmp_path.iterdir()), "a claim that failed must not be recorded"


@pytest.mark.parametrize(("wrong", "value"), [("better", "more"), ("margin", -1.0), ("margin", math.nan)])
def test_a_malformed_claim_is_refused(claim, wrong: str, value: object) -> None:
    with pytest.raises(ValueError, match=wrong):
        claim(**{**NAMES, "ours": 2.0, "baseline": 1.0, "better": "higher", wrong: value})


def test_a_claim_that_holds_is_recorded(claim, monkeypatch, tmp_path: Path, request) -> None:
    monkeypatch.setenv(claims.VARIABLE, str(tmp_path / "new"))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
    claim(**NAMES, ours=torch.tensor(1.5), baseline=2, better="lower", margin=0.5, seed=3)
    assert json.loads((tmp_path / "new" / "gw7.jsonl").read_text()) == {
        "key": "fixtures", "statement": "x beats y", "ours": 1.5, "baseline": 2.0, "baseline_name": "y",
        "better": "lower", "margin": 0.5, "seed": 3, "test": request.node.nodeid,
    }  # fmt: skip


def test_without_the_variable_nothing_is_recorded(claim, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv(claims.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    claim(**NAMES, ours=1.0, baseline=0.0, better="higher")
    assert not list(tmp_path.iterdir())


def _claim(key: str, test: str, ours: float = 2.0, statement: str = "x beats y") -> claims.Claim:
    return claims.Claim(key, statement, ours, 1.0, "y", "higher", 0.0, 0, test)


def test_the_ledger_groups_by_room_and_keeps_the_last_of_a_repeated_test(tmp_path: Path) -> None:
    claims.record(_claim("a", "tests/a.py::t", 2.0), tmp_path)
    claims.record(_claim("b", "tests/b.py::t", 7.5, "p|q"), tmp_path)
    claims.record(_claim("a", "tests/a.py::t", 3.25), tmp_path)
    text = claims.ledger(claims.read(tmp_path), [row("b", "kv", ""), row("a"), row("silent")])
    assert "3.25" in text
    assert "| 2 |" not in text
    assert text.index("## ops") < text.index("[a](https://arxiv.org/abs/2401.00001") < text.index("## kv")
    assert "p\\|q" in text
    assert "Without a claim: `silent`." in text


def test_a_run_of_some_tests_keeps_the_rows_of_other_systems(tmp_path: Path) -> None:
    rows = [row("b", "kv", ""), row("a"), row("c")]
    whole = claims.ledger([_claim("a", "tests/a.py::t"), _claim("b", "tests/b.py::t", 7.5)], rows)
    old = claims.kept(whole)
    assert {key: len(lines) for key, lines in old.items()} == {"a": 1, "b": 1}
    text = claims.ledger([_claim("a", "tests/a.py::t", 9.25), _claim("c", "tests/c.py::t", 4.5)], rows, old)
    assert all(number in text for number in ("9.25", "7.5", "4.5")) and "| 2 |" not in text
    assert "Without a claim" not in text


def test_a_claim_of_an_unknown_system_stops_the_ledger() -> None:
    with pytest.raises(ValueError, match="ghost"):
        claims.ledger([_claim("ghost", "tests/g.py::t")], [row("a")])


def test_the_ledger_says_when_there_is_nothing_to_read(tmp_path: Path, capsys) -> None:
    assert claims.main([str(tmp_path), "--out", str(tmp_path / "claims.md")]) == 2
    assert claims.VARIABLE in capsys.readouterr().err
    assert not (tmp_path / "claims.md").exists()


def test_the_ledger_is_written(tmp_path: Path, capsys) -> None:
    claims.record(_claim("softmax", "tests/systems/ops/test_softmax.py::test_x"), tmp_path / "records")
    assert claims.main([str(tmp_path / "records"), "--out", str(tmp_path / "docs" / "claims.md")]) == 0
    assert "Attention Is All You Need" in (tmp_path / "docs" / "claims.md").read_text("utf-8")


def test_memory_that_foveate_asks_for_is_poisoned(poisoned_memory) -> None:
    held: dict[str, object] = {"__name__": "foveate.somewhere", "torch": torch}
    calls = "torch.empty(3)", "torch.ones(2).new_empty(2)", "torch.empty_like(torch.ones(1))"
    *floats, integers = (eval(call, held) for call in (*calls, "torch.empty(2, dtype=torch.int8)"))
    assert all(x.isnan().all() for x in floats)
    assert (integers == 127).all()
    assert KVState.empty(1, 1, 2, 2, torch.float32, torch.device("cpu")).k.shape == (1, 1, 0, 2)


def test_memory_that_others_ask_for_is_left_alone(poisoned_memory) -> None:
    assert torch.empty(4).shape == (4,)
    kept = torch.ones(4)
    assert torch.empty_like(kept).dtype == kept.dtype
    assert torch.empty(2, device="meta").is_meta
