"""CONTRIBUTING.md shows real code: every line of its excerpts stands in the system that it works through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    "src/foveate/ops/sparse/s2_attention.py",
    "src/foveate/catalog/ops.toml",
    "tests/systems/ops/test_s2_attention.py",
]


@pytest.mark.parametrize(
    "block", re.findall(r"```(?:python|toml)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
)
def test_excerpts_are_real(block: str) -> None:
    lines = {line for source in SOURCES for line in (ROOT / source).read_text("utf-8").splitlines()}
    missing = [line for line in block.splitlines() if line and line not in lines]
    assert not missing


def test_named_files_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = re.findall(r"`((?:src|tests|docs|core)/[\w/.]+\.\w+)`", text)
    assert len(paths) > 3
    for path in paths:
        base = ROOT / "src/foveate" if path.startswith("core") else ROOT
        assert (base / path).is_file() or path == "docs/claims.md", path
