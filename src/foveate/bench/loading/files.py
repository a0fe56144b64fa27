"""Checks of a checkpoint's files before anything is read from them, so that the refusal names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from foveate.bench.loading.refusal import refused, several

INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs.github.com/spec"
#: Side files that transformers, tokenizers or peft read as one JSON object.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json", "adapter_config.json", INDEX,
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def check(name: str, folder: Path) -> None:
    """Refuse a folder whose side files or weights are broken."""
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
    """The JSON object that a side file holds."""
    not_a_pointer(name, file)
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
    """The files of weights, as the index names them, or the only one."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    if not (folder / INDEX).exists():
        own = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
        if len(own) > 1 or (own and own[0].name.startswith("model-")):
            raise refused(name, f"cannot be loaded: {several(path.name for path in own)} need a {INDEX}")
        return own
    places = read_object(name, folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise refused(name, f"cannot be loaded: {INDEX} must hold a weight_map from tensors to files")
    files = sorted(set(places.values()))
    if astray := [file for file in files if Path(file).name != file]:
        raise refused(name, f"cannot be loaded: {INDEX} points out of the folder, to {several(astray)}")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise refused(name, f"cannot be loaded: {INDEX} names {several(missing)}, which the folder lacks")
    return [folder / file for file in files]


def tensors(name: str, file: Path) -> list[str]:
    """The names of a safetensors file's tensors; its header must be whole and cover all of the file."""
    not_a_pointer(name, file)
    try:
        with safe_open(file, "pt") as held:
            return list(held.keys())
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size if file.is_file() else 0
        why = f"{file.name} ({size:,} bytes) is no whole safetensors file: {error}"
        raise refused(name, f"cannot be loaded: {why}") from None


def not_a_pointer(name: str, file: Path) -> None:
    """Refuse what Git LFS leaves in the place of a file that was not fetched."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(_POINTER))
    except OSError as error:
        raise refused(name, f"cannot be loaded: {file.name} cannot be read: {error.strerror or error}") from None
    if begins == _POINTER:
        raise refused(name, f"cannot be loaded: {file.name} is a Git LFS pointer; `git lfs pull` fetches the file")
