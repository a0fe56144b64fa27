"""The location of a model's files: a folder, a GGUF file, an adapter with its base, or a hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from foveate.bench.loading.refusal import refused
from foveate.labs import LABS

ADAPTER = "adapter_config.json"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Source:
    """The location of a model.

    Args:
        name: the name that the user gave.
        location: a folder, or a hub id.
        gguf: a file at the location that holds the whole model, or None.
        adapter: the folder of an adapter for the model, or None.
    """

    name: str
    location: str
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a model on a hub."""
        return Path(self.location) if Path(self.location).is_dir() else None

    @property
    def files(self) -> list[Path]:
        """The local files that define the model."""
        if self.folder is None:
            return []
        own = [self.folder / self.gguf] if self.gguf else _files(self.folder)
        return own if self.adapter in (None, self.folder) else [*own, *_files(self.adapter)]


def find(model: str | None) -> Source:
    """Find the model of this name; None is the lab model."""
    if model is None:
        return Source("lab", str(LABS["lm"].path))
    if not model.strip():
        raise refused(model, "must be a folder, a GGUF file or a hub id; it is empty")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return _in_folder(model, path)
        if path.is_file():
            return _file(model, path)
    except (OSError, RuntimeError) as error:  # such as no permission, or a name that is too long
        raise refused(model, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _on_hub(model)


def _on_hub(model: str) -> Source:
    """Find a model by its hub id; a name that can only be a path is refused."""
    local = model.startswith((".", "/", "~")) or "\\" in model or ":" in model
    parts = model.split("/")
    if not local and len(parts) > 2 and model.endswith(".gguf"):
        return Source(model, "/".join(parts[:2]), "/".join(parts[2:]))
    if local or len(parts) > 2 or model.endswith(".gguf"):
        raise refused(model, "is no folder and no GGUF file")
    return Source(model, model)


def _in_folder(name: str, folder: Path) -> Source:
    adapter = folder if (folder / ADAPTER).is_file() else None
    if (folder / "config.json").is_file():
        return Source(name, str(folder), adapter=adapter)
    if adapter is not None:
        base = find(_base(name, folder))
        if base.adapter is not None:
            raise refused(name, f"is an adapter whose base {base.name!r} has an adapter itself; merge that one first")
        return Source(name, base.location, base.gguf, adapter)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, str(folder), files[0])
    if files:
        raise refused(name, f"holds several GGUF files; name one of {', '.join(files)}")
    raise refused(name, "holds no config.json, adapter_config.json or GGUF file")


def _base(name: str, folder: Path) -> str:
    """Return the base model that an adapter names; a relative path may start at the adapter's folder."""
    try:
        base = json.loads((folder / ADAPTER).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise refused(name, f"cannot be loaded: {ADAPTER} is not a JSON object ({error})") from None
    if not isinstance(base, str) or not base:
        raise refused(name, f"is an adapter whose {ADAPTER} names no base_model_name_or_path")
    local = folder / base
    return str(local) if local.exists() and local.resolve() != folder.resolve() else base


def _file(name: str, path: Path) -> Source:
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic == _MAGIC or path.suffix == ".gguf":
        return Source(name, str(path.parent), path.name)
    raise refused(name, "is a file, and no GGUF file; it must be the folder with config.json and the weights")


def _files(folder: Path) -> list[Path]:
    kinds = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py"}
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in kinds)
