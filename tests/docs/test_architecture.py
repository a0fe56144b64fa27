"""docs/architecture.md and docs/design-notes.md are true: the files they name exist, and seams have their hooks."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import foveate
from tests.support.readme import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
SEAMS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `foveate.")]


def named_files(text: str) -> set[str]:
    return {
        path.rstrip("/")
        for path in re.findall(
            r"(?:core|ops|nn|host|kv|lens|tasks|models|train|bench|cli|catalog)/[\w/]+(?:\.\w+)?", text
        )
    }


def test_the_files_that_it_names_are_there() -> None:
    pictures = "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("architecture-*.svg"))
    notes = "\n".join(re.findall(r"`((?!tests/)[^`\n]+)`", (ROOT / "docs" / "design-notes.md").read_text("utf-8")))
    files = named_files(PAGE.split("## Seams")[0]) | named_files(pictures) | named_files(notes)
    assert len(files) > 30
    assert [file for file in sorted(files) if not (ROOT / "src" / "foveate" / file).exists()] == []


def test_the_contracts_that_it_names_are_all_of_them() -> None:
    named = {pattern: set(ROOT.glob(pattern)) for pattern in re.findall(r"`(tests/[\w/*]+\.py)`", PAGE)}
    assert [pattern for pattern, files in named.items() if not files] == []
    contracts = set((ROOT / "tests" / "contracts").glob("test_*.py"))
    left = contracts - {file for files in named.values() for file in files}
    assert not left, "a contract belongs to a seam: name it in docs/architecture.md"


def test_seams_have_the_hooks_that_it_says() -> None:
    assert len(SEAMS) > 12
    for seam, writes, *_ in SEAMS:
        _, room, name = seam.strip("`").split(".")
        cls = getattr(getattr(foveate, room), name)
        assert [hook for hook in re.findall(r"`(\w+)`", writes) if not hasattr(cls, hook)] == [], seam


def test_every_room_has_its_place() -> None:
    rooms = {path.parent.name for path in (ROOT / "src" / "foveate").glob("*/__init__.py")}
    table = PAGE.split("## Rooms")[1].split("## A tensor")[0]
    assert rooms <= set(re.findall(r"`(\w+)`", table))


def test_the_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architecture"] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    for name in ("attend", "apply"):
        getattr(module, name)().save(tmp_path / "made.svg")
        committed = ROOT / "docs" / f"architecture-{name}.svg"
        assert (tmp_path / "made.svg").read_text("utf-8") == committed.read_text("utf-8"), "python docs/architecture.py"
