"""A person's own prompts and expected answers, from the files that people have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.files import records, rows


@dataclass(frozen=True)
class Prompts(Task):
    """Examples from a file: `.jsonl`, `.json`, `.csv`, `.tsv` (these also with `.gz`), `.parquet`, or a folder that
    Hugging Face's datasets saved.

    Rows are `{"prompt": ..., "answer": ...}`, or those of a known benchmark (see `tasks/files/formats.py`), or have the
    fields that are named here.

    Args:
        path: the file.
        count: take so many from the start; None takes all.
        prompt_field: the field of the prompt, with dots into objects (`doc.question`), or a text with fields in braces
            (`{context} Question: {question}`).
        answer_field: the field of the answer, or of a list of accepted ones.

    Raises:
        TaskError: where the file or a row is unusable, naming the line.
    """

    path: Path
    count: int | None = None
    prompt_field: str | None = None
    answer_field: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.path.name

    @property
    def metric(self) -> str:  # type: ignore[override]
        """The score that fits the first row's format."""
        return self._read[1]

    def examples(self) -> list[Example]:
        return list(self._read[0])

    @cached_property
    def _read(self) -> tuple[tuple[Example, ...], str]:
        found, metric = [], ""
        for place, row in islice(records.read(self.path), self.count):
            where = f"task={str(self.path)!r} {place}"
            example, fitting = rows.example(row, where, self.prompt_field, self.answer_field)
            found.append(example)
            metric = metric or fitting
        if not found:
            raise TaskError(f"task={str(self.path)!r} holds no examples")
        return tuple(found), metric
