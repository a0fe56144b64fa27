"""docs/studies.md is what `make studies` writes from its files, and every study of the catalogue is in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from foveate.core.catalog import systems
from foveate.report.study import from_json
from tests.contracts.studies import STUDIES, Coins
from tests.support.readme import ROOT


@pytest.fixture
def script() -> ModuleType:
    made = importlib.util.spec_from_file_location("studies_page", ROOT / "docs" / "studies.py")
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def test_the_page_is_that_of_its_files(script: ModuleType) -> None:
    assert (ROOT / "docs" / "studies.md").read_text("utf-8") == script.text(), "make studies"
    assert "Not measured yet" not in script.text()


@pytest.mark.parametrize("key", STUDIES)
def test_the_files_are_of_the_studies_own_sizes_and_all_hold(script: ModuleType, key: str) -> None:
    found = from_json((script.MEASURED / f"{key}.json").read_text("utf-8"))
    assert found.study == STUDIES[key].__name__ and found.options == STUDIES[key]()._options()
    assert found.holds and found.seconds < 120


def test_a_run_writes_its_file_and_the_page(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(script, "PAGE", tmp_path / "studies.md")
    monkeypatch.setattr(script, "study_of", lambda key: Coins)
    assert script.main(["scan_and_snap"]) == 0
    page = (tmp_path / "studies.md").read_text("utf-8")
    assert "## scan_and_snap" in page and "| Coins fall. | all of them | 1 | at least 1 | yes |" in page
    others = [f"`{row.key}`" for row in systems("studies") if row.key != "scan_and_snap"]
    assert f"Not measured yet: {', '.join(others)}." in page
    monkeypatch.setattr(script, "study_of", lambda key: lambda: Coins(throws=1))
    assert script.main(["scan_and_snap"]) == 1 and "**no**" in (tmp_path / "studies.md").read_text("utf-8")
