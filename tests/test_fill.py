"""`docs/fill.py` puts measurements where their marks stand, and nowhere else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a copy of the pages."""
    made = importlib.util.spec_from_file_location("fill", ROOT / "docs" / "fill.py")
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    (tmp_path / "docs" / "measured" / "recall").mkdir(parents=True)
    for name in ("README.md", "docs/benchmarks.md", "docs/recall.md", "docs/measured/recall/recall.json"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "MEASURED", tmp_path / "docs" / "measured")
    monkeypatch.setattr("sys.argv", ["fill.py"])
    return module


def row(method: str, budget: float, score: float) -> dict:
    times = {"decode_ms": 50.0, "decode_ratio": [0.5, 0.4, 0.6], "decode_live_mb": 12.5}
    scores = {"all": {"mean": score, "low": 0.1, "high": 0.9}}
    return {
        "method": method,
        "budget": budget,
        "scores": scores,
        "kept": budget,
        "read": budget,
        "times": {"900": times},
    }


def test_sections_are_filled_from_what_was_measured(fill: ModuleType, tmp_path: Path) -> None:
    rows = [row("full", 1.0, 0.8), row("sink_recent", 0.25, 0.3), row("sink_recent", 0.5, 0.4)]
    measured = {"plan": {"budgets": [0.25, 0.5]}, "models": [{"name": "Tiny", "rows": rows}]}
    (tmp_path / "docs" / "measured" / "real.json").write_text(json.dumps(measured))
    (tmp_path / "docs" / "measured" / "window.json").write_text('{"speed-up": 2.5, "note": "text"}')
    decoding = {"fp32 64 at 0.5: sink / plain": 0.801, "fp32 64 at 0.5: sink, share of the ideal saving": 0.93}
    (tmp_path / "docs" / "measured" / "decode_real.json").write_text(
        json.dumps({**decoding, "bf16 64 at 0.5: apply / plain": 1.004})
    )
    before = (tmp_path / "README.md").read_text("utf-8")
    fill.main()
    after = (tmp_path / "README.md").read_text("utf-8")
    section = after.partition("<!-- real -->")[2].partition("<!-- /real -->")[0]
    assert "**Tiny**, budget 25%:" in section
    assert "| `sink_recent` | 30% (10–90) | 25% | 25% | 12.5 | 50.0 ms, 0.50× (0.40–0.60) |" in section
    assert "40%" not in section
    for mark in ("<!-- real -->", "<!-- /real -->"):
        assert after.count(mark) == 1
    assert after.partition("<!-- real -->")[0] == before.partition("<!-- real -->")[0]
    assert after.partition("<!-- /real -->")[2] == before.partition("<!-- /real -->")[2]
    bench = (tmp_path / "docs" / "benchmarks.md").read_text("utf-8")
    assert bench.partition("<!-- bench -->")[2].count("benchmarks/") == 1
    assert "| sink | 0.80× (93%) | – |\n| apply | – | 1.00× |" in bench
    assert "| `benchmarks/window.py` | speed-up | 2.5 |" in bench
    assert "based 16, window 32" in (tmp_path / "docs" / "recall.md").read_text("utf-8")


def test_what_was_not_measured_stays(fill: ModuleType, tmp_path: Path) -> None:
    before = (tmp_path / "README.md").read_bytes()
    fill.main()
    assert (tmp_path / "README.md").read_bytes() == before


def test_a_mark_that_is_gone_is_said(fill: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "docs" / "recall.md").write_text("no marks")
    with pytest.raises(SystemExit, match=r"recall.md has no section recall"):
        fill.main()
