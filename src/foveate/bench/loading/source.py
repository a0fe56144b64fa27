"""Where a model's files are: a folder, a GGUF file, an adapter with its base, or a hub."""

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
    """A model's whereabouts.

    Args:
        name: as the person gave it.
        place: folder, or hub id.
        gguf: a file of the place that holds the whole model, or None.
        adapter: folder of an adapter to put on the model, or None.
    """

    name: str
    place: str
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a hub."""
        return Path(self.place) if Path(self.place).is_dir() else None

    @property
    def files(self) -> list[Path]:
        """The local files that make the model what it is."""
        if self.folder is None:
            return []
        own = [self.folder / self.gguf] if self.gguf else _files(self.folder)
        return own if self.adapter in (None, self.folder) else [*own, *_files(self.adapter)]


def find(model: str | None) -> Source:
    """The model of this name; None is the lab's."""
    if model is None:
        return Source("lab", str(LABS["lm"].path))
    if not model.strip():
        raise refused(model, "is empty; name a folder, a GGUF file or a hub id")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return _in_folder(model, path)
        if path.is_file():
            return _file(model, path)
    except (OSError, RuntimeError) as error:  # no permission, a name too long; no home folder
        raise refused(model, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _elsewhere(model)


def _elsewhere(model: str) -> Source:
    """A model by its hub id; a name that can only be a path is refused."""
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
        return Source(name, base.place, base.gguf, adapter)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, str(folder), files[0])
    if files:
        raise refused(name, f"holds several GGUF files; name one of {', '.join(files)}")
    raise refused(name, "holds no config.json, adapter_config.json or GGUF file")


def _base(name: str, folder: Path) -> str:
    """What an adapter says that it was trained on; a relative path counts from the adapter, then from here."""
    try:
        base = json.loads((folder / ADAPTER).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise refused(name, f"cannot be loaded: {ADAPTER} is not a JSON object ({error})") from None
    if not isinstance(base, str) or not base:
        raise refused(name, f"is an adapter, and its {ADAPTER} names no base_model_name_or_path")
    beside = folder / base
    return str(beside) if beside.exists() and beside.resolve() != folder.resolve() else base


def _file(name: str, path: Path) -> Source:
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic == _MAGIC or path.suffix == ".gguf":
        return Source(name, str(path.parent), path.name)
    raise refused(name, "is a file, and no GGUF file; name the folder that holds config.json and the weights")


def _files(folder: Path) -> list[Path]:
    kinds = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py"}
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in kinds)
