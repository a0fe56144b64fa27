"""What one run of `compare` measured, as plain data: needs neither torch nor any other package.

A `Comparison` holds one `Row` per method and one `Answer` per example. It goes to `results.json` and back without loss,
with two exceptions, for which JSON has no token: NaN and infinity are written as `null` and read as NaN, and options
that are not plain data are written as their `str`.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from foveate.core.errors import OptionError

FORMAT = "foveate.comparison/1"
MEASURES = ("score", "cache_kept", "keys_read", "prefill_ms", "decode_ms", "peak_mb")


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt, and its score in 0..1."""

    prompt: str
    expected: str
    output: str
    score: float


@dataclass(frozen=True)
class Row:
    """One method on the whole task.

    Args:
        method: its key in the catalogue.
        title: its name in words, for instance that of the paper.
        options: what it ran with; `arxiv`, where present, is shown as a link to the paper.
        score: mean score of the answers, 0..1.
        cache_kept: share of the full cache's slots that were stored, 0..1.
        keys_read: share of the visible keys read while decoding, 0..1.
        prefill_ms: milliseconds to read one prompt.
        decode_ms: milliseconds for each generated token.
        peak_mb: peak memory in megabytes.
        answers: one per example, in the order of the examples.
    """

    method: str
    title: str
    options: dict
    score: float
    cache_kept: float
    keys_read: float
    prefill_ms: float
    decode_ms: float
    peak_mb: float
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Methods side by side in one run: append a `Row` to `rows` as each is measured.

    Args:
        length: of the prompts, or None where the task has no such setting.
        budget: share of the cache that every method was asked to stay within.
        examples: how many prompts each method answered.
        versions: of the packages that ran, by name.
        baseline: key of the method that ratios refer to.
    """

    model: str
    task: str
    seed: int
    device: str
    dtype: str
    budget: float
    examples: int
    length: int | None
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    baseline: str = "full"

    def base(self) -> Row | None:
        """The baseline's row, or None while it has not been measured."""
        return next((row for row in self.rows if row.method == self.baseline), None)

    def ratio(self, row: Row, measure: str) -> float | None:
        """`row`'s `measure` over the baseline's; None where either is missing or the baseline's is zero."""
        if measure not in MEASURES:
            raise OptionError(f'measure="{measure}" must be one of {", ".join(MEASURES)}')
        base = self.base()
        if base is None:
            return None
        value, reference = getattr(row, measure), getattr(base, measure)
        if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
            return None
        return value / reference

    def settings(self) -> dict[str, Any]:
        """All that identifies the run. Where two runs agree in it, the rows of one may stand in the other."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self) if item.name != "rows"}

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back."""
        content = {"format": FORMAT, **self.settings(), "rows": plain(self.rows)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote; an `OptionError` names the first field that does not fit."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"not valid JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OptionError(f'not a comparison: "format" must be "{FORMAT}"')
        values = {name: value for name, value in content.items() if name != "format"}
        return _build(cls, values, "")

    def save(self, path: str | os.PathLike) -> Path:
        """Write `results.json`; whoever reads `path` sees the old file or the new one, never half of one."""
        return write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Comparison:
        """Read what `save` wrote; a missing or malformed file is an `OptionError` that names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"cannot read results {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise OptionError(f"cannot read results {path}: not UTF-8 text") from None
        except OptionError as error:
            raise OptionError(f"cannot read results {path}: {error}") from None


def write_atomic(path: str | os.PathLike, text: str) -> Path:
    """Write `text` beside `path`, then move it there in one step; missing folders are made."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A byte-level model may emit lone surrogates, which UTF-8 cannot hold.
            draft.write_text(text, encoding="utf-8", errors="replace", newline="\n")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def plain(value: Any) -> Any:
    """`value` in terms that JSON has; numbers that are not finite become None, foreign objects their `str`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # NumPy's scalars too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def _build(cls: type, content: Any, where: str) -> Any:
    """A `cls` from what JSON gave, each field checked against its declared type."""
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
    return cls(**{name: _read(content[name], kind, dot + name) for name, kind in declared.items()})


def _read(value: Any, kind: str, where: str) -> Any:
    """`value` checked against the field type `kind`, as written in the classes above."""
    wanted, fits = _KINDS[kind]
    if not fits(value):
        raise OptionError(f"{where} must be {wanted}, got {_shown(value)}")
    if kind == "float":
        return math.nan if value is None else _to_float(value, where)
    if kind in _ITEMS:
        return [_build(_ITEMS[kind], item, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def _is(*kinds: type) -> Callable[[Any], bool]:
    """A check for `kinds`; True and False, which Python counts among the integers, do not pass as numbers."""
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


_NONE = type(None)
_ITEMS = {"list[Row]": Row, "list[Answer]": Answer}
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("text", _is(str)),
    "int": ("an integer", _is(int)),
    "int | None": ("an integer or null", _is(int, _NONE)),
    "float": ("a number or null", _is(int, float, _NONE)),
    "dict": ("an object", _is(dict)),
    "dict[str, str]": ("an object of texts", lambda value: _is(dict)(value) and all(map(_is(str), value.values()))),
    "list[Row]": ("a list", _is(list)),
    "list[Answer]": ("a list", _is(list)),
}


def _to_float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise OptionError(f"{where} is too large for a number") from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
