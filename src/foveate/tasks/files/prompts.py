"""The task of the user's own prompts and expected answers, read from a file."""

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
    """Examples from a file: `.jsonl`, `.json`, `.csv`, `.tsv` (these also with `.gz`), `.parquet`, or a folder saved by
    Hugging Face datasets.

    Rows are `{"prompt": ..., "answer": ...}`, rows of a known benchmark (see `tasks/files/formats.py`), or rows with
    the fields named here.

    Args:
        path: the file.
        count: how many examples to read, from the start; None reads all.
        prompt_field: the field of the prompt, with dots into objects (`doc.question`), or a template with fields in
            braces (`{context} Question: {question}`).
        answer_field: the field of the answer, or of a list of accepted ones.

    Raises:
        TaskError: if the file or a row cannot be used; the message names the line.
    """

    path: Path
    count: int | None = None
    prompt_field: str | None = None
    answer_field: str | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def metric(self) -> str:
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
            raise TaskError(f"task={str(self.path)!r} holds no examples; it must hold at least one")
        return tuple(found), metric
