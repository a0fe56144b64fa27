"""Dataclasses to JSON and back with type checks, and atomic writes of files."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from foveate.core.errors import OptionError


def write_atomic(path: str | os.PathLike, text: str) -> Path:
    """Write `text` to a draft, then move it to `path` in one step; missing folders are created."""
    # A byte-level model may emit lone surrogates, which UTF-8 cannot hold.
    return draft_and_move(path, lambda draft: draft.write_text(text, encoding="utf-8", errors="replace", newline="\n"))


def draft_and_move(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Let `write` make a draft, then move it to `path` in one step; missing folders are created."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OptionError(f"cannot write {target}: {reason}") from None
    return target


def version_of(path: Path) -> str | None:
    """Return the format that a file of Foveate's names, such as `foveate.comparison/1`; None for other files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = content.get("format") if isinstance(content, dict) else None
    return found if isinstance(found, str) and found.startswith("foveate.") else None


def plain(value: Any) -> Any:
    """Convert `value` to JSON types; numbers that are not finite become None, unknown objects their `str`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # also NumPy's scalars
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def build(cls: type, content: Any, items: Mapping[str, type], where: str = "") -> Any:
    """Build a `cls` from JSON data and check each field against its type; `items` has the lists' classes."""
    if not isinstance(content, dict):
        raise OptionError(f"{where or 'the file'} must be an object, got {_shown(content)}")
    declared = {item.name: str(item.type) for item in fields(cls)}
    dot = f"{where}." if where else ""
    for name in content:
        if name not in declared:
            raise OptionError(f"{dot}{name!r} is unknown; known: {', '.join(declared)}")
    for name in declared:
        if name not in content:
            raise OptionError(f"{dot}{name} is missing")
    return cls(**{name: _read(content[name], kind, items, dot + name) for name, kind in declared.items()})


def _read(value: Any, kind: str, items: Mapping[str, type], where: str) -> Any:
    """Check `value` against the field type `kind`, as annotated in the class, and convert it."""
    wanted, fits = ("a list", _is(list)) if kind in items else _KINDS[kind]
    if not fits(value):
        raise OptionError(f"{where} must be {wanted}, got {_shown(value)}")
    if kind == "float":
        return math.nan if value is None else _to_float(value, where)
    if kind in items:
        return [build(items[kind], item, items, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def _is(*kinds: type) -> Callable[[Any], bool]:
    """Return a type check for `kinds` that does not accept booleans as numbers."""
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


_NONE = type(None)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("text", _is(str)),
    "int": ("an integer", _is(int)),
    "int | None": ("an integer or null", _is(int, _NONE)),
    "float": ("a number or null", _is(int, float, _NONE)),
    "dict": ("an object", _is(dict)),
    "list[float]": ("a list of numbers", lambda value: _is(list)(value) and all(map(_is(int, float), value))),
    "list[str]": ("a list of texts", lambda value: _is(list)(value) and all(map(_is(str), value))),
    "dict[str, str]": ("an object of texts", lambda value: _is(dict)(value) and all(map(_is(str), value.values()))),
}


def _to_float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise OptionError(f"{where} is too large for a number") from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
