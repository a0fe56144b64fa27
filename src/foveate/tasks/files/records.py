"""Readers of rows from JSON lines, JSON, CSV, Parquet, and folders of Hugging Face datasets.

Each reader yields `(place, row)`: the place, such as "line 3", is for error messages; a valid row is a dict.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from foveate.core.errors import TaskError

Rows = Iterator[tuple[str, Any]]
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
#: Keys under which a JSON file may hold its list of rows.
_LISTS = ("data", "rows", "examples", "instances", "samples")
_FOLDER = ("dataset_info.json", "dataset_dict.json")


def read(path: Path) -> Rows:
    """Yield the rows of a file or folder, in order.

    Raises:
        TaskError: if the file type is unknown or the file is unreadable or damaged; the message names the place.
    """
    try:
        if path.is_dir():
            yield from _dataset(path)
            return
        reader = READERS.get(kind(path))
        if reader is None:
            raise TaskError(f"task={str(path)!r} must end in one of {', '.join(READERS)}, or be a dataset's folder")
        yield from reader(path)
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise TaskError(f"task={str(path)!r} cannot be read: {why}") from None
    except UnicodeDecodeError:
        raise TaskError(f"task={str(path)!r} is not UTF-8 text") from None


def kind(path: Path) -> str:
    """Return the file's type: the suffix of its name before any `.gz`."""
    ends = [end.lower() for end in path.suffixes]
    return "".join(ends[-2:-1] if ends[-1:] == [".gz"] else ends[-1:])


def is_file(name: str) -> bool:
    """Return True if the name is that of a file or folder: it exists, or its suffix is a known one."""
    try:
        return kind(Path(name)) in READERS or Path(name).exists()
    except OSError:  # the name is not valid for a file
        return False


def _lines(path: Path) -> Rows:
    # Only a line feed ends a line: JSON strings may contain Unicode's other line separators.
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):
                break
            yield f"line {number}", _parsed(path, f"line {number}", line)
        else:
            return
    yield from _json(path)


def _json(path: Path) -> Rows:
    with _opened(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines in a file named .json
            yield from _lines(path)
            return
        raise TaskError(f"task={str(path)!r} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"task={str(path)!r} is not JSON: {error}") from None
    if isinstance(content, dict):
        rows = next((content[name] for name in _LISTS if isinstance(content.get(name), list)), None)
        content = [content] if rows is None else rows
    if not isinstance(content, list):
        raise TaskError(f"task={str(path)!r} must be a list of objects; got {type(content).__name__}")
    for number, row in enumerate(content, 1):
        inner = row.get("row") if isinstance(row, dict) else None  # the hub's dataset viewer wraps rows like this
        yield f"item {number}", inner if isinstance(inner, dict) else row


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"task={str(path)!r} {place} is not JSON: {error}") from None


def _csv(path: Path) -> Rows:
    with _opened(path, newline="") as file, _long_fields():
        head = file.readline()
        file.seek(0)
        between = "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","
        reader = csv.DictReader(file, delimiter=between, strict=True)
        try:
            for row in reader:
                place = f"line {reader.line_num}"
                names = reader.fieldnames or []
                count = len(row) + len(row.get(None, ())) - (None in row) - sum(v is None for v in row.values())
                if count != len(names):
                    raise TaskError(f"task={str(path)!r} {place} has {count} fields; the header has {len(names)}")
                yield place, row
        except csv.Error as error:
            raise TaskError(f"task={str(path)!r} line {reader.line_num} is not CSV: {error}") from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters per field, since prompts may be longer."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise TaskError(f"task={str(path)!r} is a Parquet file; pip install 'foveate[data]' to read it") from None
    try:
        with path.open("rb") as opened:  # so that an unreadable file raises OSError, with its reason
            file = parquet.ParquetFile(opened)
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise TaskError(f"task={str(path)!r} is not a valid Parquet file: {_first_line(error)}") from None


def _dataset(path: Path) -> Rows:
    if not any((path / name).is_file() for name in _FOLDER):
        files = sorted(file.name for file in path.iterdir() if kind(file) in READERS and file.is_file())
        hint = f"; valid files in it: {', '.join(files[:5])}" if files else ""
        raise TaskError(f"task={str(path)!r} must contain {' or '.join(_FOLDER)}{hint}")
    try:
        import datasets
    except ImportError:
        raise TaskError(f"task={str(path)!r} is a dataset; pip install 'foveate[data]' to read it") from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001  it raises the errors of several packages
        raise TaskError(f"task={str(path)!r} is a dataset that cannot be read: {_first_line(error)}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            splits = ", ".join(f"{path.name}{os.sep}{split}" for split in dataset)
            raise TaskError(f"task={str(path)!r} holds several splits; name one of {splits}")
        dataset = next(iter(dataset.values()))
    for number, row in enumerate(dataset, 1):
        yield f"row {number}", row


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open the file as text: decompress `.gz`, and take the encoding from a byte-order mark (default UTF-8)."""
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as binary:
        start = binary.read(3)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    with opener(path, "rt", encoding=encoding, newline=newline) as file:
        yield file


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
