"""Rows of the files that people keep prompts in: JSON lines, JSON, CSV, Parquet, folders of Hugging Face datasets.

Each reader yields `(place, row)`: the place names the row in an error, as "line 3", and the row is an object.
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
#: Names under which a JSON file may hold its list of rows.
_LISTS = ("data", "rows", "examples", "instances", "samples")
_FOLDER = ("dataset_info.json", "dataset_dict.json")


def read(path: Path) -> Rows:
    """The rows of a file or folder, in order.

    Raises:
        TaskError: where it is of no kind that is known, cannot be read, or is broken; the line names the place.
    """
    try:
        if path.is_dir():
            yield from _dataset(path)
            return
        reader = READERS.get(kind(path))
        if reader is None:
            raise TaskError(f"task={str(path)!r} must be one of {', '.join(READERS)}, or a folder of a dataset")
        yield from reader(path)
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise TaskError(f"task={str(path)!r} cannot be read: {why}") from None
    except UnicodeDecodeError:
        raise TaskError(f"task={str(path)!r} is not UTF-8 text") from None


def kind(path: Path) -> str:
    """The file's kind by the end of its name, less `.gz`."""
    ends = [end.lower() for end in path.suffixes]
    return "".join(ends[-2:-1] if ends[-1:] == [".gz"] else ends[-1:])


def is_file(name: str) -> bool:
    """Whether a name is that of prompts: something that is there, or that would be read if it were."""
    try:
        return kind(Path(name)) in READERS or Path(name).exists()
    except OSError:  # a name that no file can have
        return False


def _lines(path: Path) -> Rows:
    # Only a line feed ends a line: JSON's texts may hold every other separator that Unicode has.
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
        if error.msg == "Extra data":  # lines under another name
            yield from _lines(path)
            return
        raise TaskError(f"task={str(path)!r} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"task={str(path)!r} is not JSON: {error}") from None
    if isinstance(content, dict):
        held = next((content[name] for name in _LISTS if isinstance(content.get(name), list)), None)
        content = [content] if held is None else held
    if not isinstance(content, list):
        raise TaskError(f"task={str(path)!r} must be a list of objects; got {type(content).__name__}")
    for number, row in enumerate(content, 1):
        inner = row.get("row") if isinstance(row, dict) else None  # as the hub's viewer writes them
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
    """Fields longer than csv's default limit of 131,072 characters: prompts are."""
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
        with path.open("rb") as opened:  # an OSError of ours, with the reason, where it cannot be read
            file = parquet.ParquetFile(opened)
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise TaskError(f"task={str(path)!r} is no whole Parquet file: {_first(error)}") from None


def _dataset(path: Path) -> Rows:
    if not any((path / name).is_file() for name in _FOLDER):
        files = sorted(file.name for file in path.iterdir() if kind(file) in READERS and file.is_file())
        hint = f"; name one of {', '.join(files[:5])}" if files else ""
        raise TaskError(f"task={str(path)!r} is a folder without {' or '.join(_FOLDER)}{hint}")
    try:
        import datasets
    except ImportError:
        raise TaskError(f"task={str(path)!r} is a dataset; pip install 'foveate[data]' to read it") from None
    try:
        held = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001  it raises what its own readers do, of four packages
        raise TaskError(f"task={str(path)!r} is a dataset that cannot be read: {_first(error)}") from None
    if isinstance(held, datasets.DatasetDict):
        if len(held) != 1:
            splits = ", ".join(f"{path.name}{os.sep}{split}" for split in held)
            raise TaskError(f"task={str(path)!r} holds several splits; name one of {splits}")
        held = next(iter(held.values()))
    for number, row in enumerate(held, 1):
        yield f"row {number}", row


def _first(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file as text, unpacked where it is packed, in the encoding that its first bytes tell."""
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as binary:
        begins = binary.read(3)
    encoding = next((name for mark, name in _MARKS if begins.startswith(mark)), "utf-8")
    with opener(path, "rt", encoding=encoding, newline=newline) as file:
        yield file


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
