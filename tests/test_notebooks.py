"""The tutorials run from their first cell to their last, and show what a run shows."""

from __future__ import annotations

import importlib.util
from itertools import groupby
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def runner() -> ModuleType:
    made = importlib.util.spec_from_file_location("run", ROOT / "docs" / "notebooks" / "run.py")
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def shown(book: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell prints or draws, a name for each; the kernel may send one stream of text in several pieces."""
    outputs = [[out.get("name", "image") for out in cell.get("outputs", [])] for cell in book.cells]
    return [[name for name, _ in groupby(names)] for names in outputs]


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["circuits", "compress", "look", "train"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own asserts hold, in a folder of its own; every cell that is kept with an output gives one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    kept, made = nbformat.read(path, as_version=4), runner().run(path, str(tmp_path))
    for before, after in zip(shown(kept), shown(made), strict=True):
        assert before == after
    asserts = [line for cell in kept.cells for line in cell.source.splitlines() if line.startswith("assert ")]
    assert len(asserts) >= 4
    assert any(shown(kept))
