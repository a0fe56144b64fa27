"""The texts in a file of rows, for work that needs no answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.core.errors import TaskError
from foveate.tasks.files.parts import conversation, text
from foveate.tasks.files.records import read
from foveate.tasks.files.rows import examples, filled

#: The fields that hold a row's text, the likeliest first, and those that hold a conversation.
FIELDS, CONVERSATIONS = ("text", "content", "document", "prompt"), ("messages", "conversations")


def texts(path: Path, field: str | None = None, option: str = "data") -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each row of a file, in order.

    Args:
        path: a file or folder that `foveate.tasks.files.records.read` reads: JSON lines, JSON, CSV, Parquet, a dataset.
        field: a field's path, with dots into objects and lists (`doc.question`), or a template with fields in braces.
            None takes "text", "content", "document" or "prompt", a conversation, or the prompt of a known benchmark.
        option: the caller's name of the path, for messages.

    Raises:
        TaskError: the file cannot be read, or a row has no text; the message names the place.
    """
    try:
        for place, row in read(path):
            yield place, _text(row, f"{option}={str(path)!r} {place}", str(path), field)
    except TaskError as error:
        named = str(error)
        raise TaskError(option + named.removeprefix("task") if named.startswith("task=") else named) from None


def _text(row: Any, where: str, path: str, field: str | None) -> str:
    if isinstance(row, str) and field is None:
        return text(row, where)
    if not isinstance(row, dict):
        raise TaskError(f"{where} must be an object with a text; got {type(row).__name__}")
    row = {str(name): value for name, value in row.items()}
    if field is not None:
        return filled(row, where, field)
    for name in FIELDS:
        if isinstance(row.get(name), str):
            return text(row[name], f"{where}: {name}")
    try:
        for name in CONVERSATIONS:
            if row.get(name):
                return conversation(row[name], name).context
        return examples(row, where, path=path)[0][0].prompt
    except (TaskError, ValueError, TypeError):
        for name in FIELDS:
            if name in row and not isinstance(row[name], list):
                raise TaskError(f"{where}: {name} must be text; got {row[name]!r:.40}") from None
        shown = ", ".join(list(row)[:8]) or "no fields"
        raise TaskError(f"{where} has {shown}; it must have text, or --field must name the field of the text") from None
