"""CONTRIBUTING.md shows real code: the lines of each excerpt stand, in their order, in a file that it works through."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from foveate.core.catalog_rows import System

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SOURCES = [
    "src/foveate/ops/sparse/s2_attention.py",
    "src/foveate/catalog/ops.toml",
    "tests/systems/ops/test_s2_attention.py",
    "src/foveate/nn/sequence/mhe_attention.py",
    "src/foveate/catalog/nn.toml",
    "tests/systems/nn/test_mhe_attention.py",
    "src/foveate/models/audio/ecapa_tdnn.py",
    "src/foveate/catalog/models.toml",
    "tests/systems/models/test_ecapa_tdnn.py",
    "src/foveate/nn/seq2seq/show_attend_tell.py",
    "tests/systems/nn/test_show_attend_tell.py",
    "src/foveate/nn/pool/efficient_probing.py",
    "tests/systems/nn/test_efficient_probing.py",
    "src/foveate/nn/fusion/cace_net.py",
    "tests/systems/nn/test_cace_net.py",
    "src/foveate/nn/vision/ulsam.py",
    "tests/systems/nn/test_ulsam.py",
    "src/foveate/kv/sink_recent.py",
    "src/foveate/catalog/kv.toml",
    "tests/systems/kv/test_sink_recent.py",
    "src/foveate/studies/attention_rank/study.py",
    "src/foveate/catalog/studies.toml",
    "tests/systems/studies/test_attention_rank.py",
    "src/foveate/train/objectives/cutmix.py",
    "src/foveate/catalog/train.toml",
    "tests/systems/train/test_cutmix.py",
    "src/foveate/train/init/mimetic_init.py",
    "tests/systems/train/test_mimetic_init.py",
    "src/foveate/steer/vision/avisc.py",
    "src/foveate/gaze/search/visual_searcher.py",
    "src/foveate/catalog/gaze.toml",
    "tests/systems/gaze/test_eccnet_search.py",
    "src/foveate/gaze/measures/saliency.py",
    "tests/gaze/test_saliency_measures.py",
]
BLOCKS = re.findall(r"```(?:python|toml)\n(.*?)```", TEXT, re.DOTALL)
ROWS = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


def is_within(lines: list[str], source: list[str]) -> bool:
    """Return whether the lines stand in a source in their order, others between them."""
    rest = iter(source)
    return all(line in rest for line in lines)


def source_of(block: str) -> str | None:
    lines = [line for line in block.splitlines() if line]
    return next((path for path in SOURCES if is_within(lines, (ROOT / path).read_text("utf-8").splitlines())), None)


@pytest.mark.parametrize("block", BLOCKS)
def test_excerpts_are_real(block: str) -> None:
    assert source_of(block) is not None, "no file of SOURCES has these lines in this order"


def test_all_kinds_of_systems_are_worked_through() -> None:
    assert {source_of(block) for block in BLOCKS} == set(SOURCES)


@pytest.mark.parametrize("row", ROWS)
def test_rows_show_every_required_field(row: str) -> None:
    required = {field.name for field in fields(System) if field.default is MISSING} - {"room"}
    assert required <= set(re.findall(r"^(\w+) = ", row, re.MULTILINE))


def test_named_files_exist() -> None:
    paths = re.findall(r"`((?:src|tests|docs|core)/[\w/.]+\.\w+)`", TEXT)
    assert len(paths) > 10
    for path in paths:
        base = ROOT / "src/foveate" if path.startswith("core") else ROOT
        assert (base / path).is_file() or path == "docs/claims.md", path


def test_named_targets_exist() -> None:
    targets = set(re.findall(r"^make ([\w-]+)", TEXT, re.MULTILINE)) | set(re.findall(r"`make ([\w-]+)`", TEXT))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "systems" in targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
