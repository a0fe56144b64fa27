"""A person's own prompts and expected answers, from a JSON-lines file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from foveate.core.errors import TaskError
from foveate.tasks.base import Example, Task


@dataclass(frozen=True)
class Prompts(Task):
    """Examples from a file with one object `{"prompt": ..., "answer": ...}` a line.

    Args:
        path: the file, UTF-8.
        count: take so many from the start; None takes all.

    Raises:
        TaskError: where the file or a line is unusable, naming the line.
    """

    path: Path
    count: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.path.name

    def examples(self) -> list[Example]:
        try:
            lines = self.path.read_text("utf-8").splitlines()
        except OSError as error:
            raise TaskError(f"task={str(self.path)!r} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise TaskError(f"task={str(self.path)!r} is not UTF-8 text") from None
        found = [self._example(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise TaskError(f"task={str(self.path)!r} holds no examples")
        return found[: self.count]

    def _example(self, number: int, line: str) -> Example:
        where = f"task={str(self.path)!r} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TaskError(f"{where} must be an object with prompt and answer; got {type(row).__name__}")
        for field in ("prompt", "answer"):
            value = row.get(field)
            if not isinstance(value, str) or not value.strip():
                raise TaskError(f"{where}: {field} must be non-empty text; got {value!r}")
        return Example(row["prompt"], row["answer"])
