"""Checks of a checkpoint's files before they are read, so that an error names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from foveate.bench.loading.refusal import refused, several

INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs.github.com/spec"
#: Files beside the weights that transformers, tokenizers or peft read as one JSON object.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json", "adapter_config.json", INDEX,
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def check(name: str, folder: Path) -> None:
    """Refuse a folder with damaged JSON files or weights."""
    for file in _OBJECTS:
        if (folder / file).exists():
            read_object(name, folder / file)
    weights = shards(name, folder)
    if not weights:
        raise refused(name, "holds no .safetensors weights (pickled ones are not loaded)")
    for shard in weights:
        tensors(name, shard)
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise refused(name, f"holds no tokenizer ({', '.join(_TOKENIZERS[:-1])})")


def read_object(name: str, file: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    refuse_pointer(name, file)
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise refused(name, f"cannot be loaded: {file.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise refused(name, f"cannot be loaded: {file.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise refused(name, f"cannot be loaded: {file.name} must be an object; got {type(content).__name__}")
    return content


def shards(name: str, folder: Path) -> list[Path]:
    """Return the files of weights: those that the index names, or the only one."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    if not (folder / INDEX).exists():
        own = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
        if len(own) > 1 or (own and own[0].name.startswith("model-")):
            raise refused(name, f"cannot be loaded: {several(path.name for path in own)} need a {INDEX}")
        return own
    mapping = read_object(name, folder / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise refused(name, f"cannot be loaded: {INDEX} must hold a weight_map from tensors to files")
    files = sorted(set(mapping.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise refused(name, f"cannot be loaded: {INDEX} points out of the folder, to {several(outside)}")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise refused(name, f"cannot be loaded: {INDEX} names {several(missing)}, which the folder lacks")
    return [folder / file for file in files]


def tensors(name: str, file: Path) -> list[str]:
    """Return the tensor names of a safetensors file; its header must be complete and cover the whole file."""
    refuse_pointer(name, file)
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size if file.is_file() else 0
        why = f"{file.name} ({size:,} bytes) is not a complete safetensors file: {error}"
        raise refused(name, f"cannot be loaded: {why}") from None


def refuse_pointer(name: str, file: Path) -> None:
    """Refuse a Git LFS pointer, which replaces a file that was not fetched."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise refused(name, f"cannot be loaded: {file.name} cannot be read: {error.strerror or error}") from None
    if start == _POINTER:
        raise refused(name, f"cannot be loaded: {file.name} is a Git LFS pointer; `git lfs pull` fetches the file")
