"""The task of the user's own prompts and expected answers, read from a file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from foveate.core import validate
from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.files import records, rows
from foveate.tasks.files.benchmarks import scbench
from foveate.tasks.rules.registry import common


@dataclass(frozen=True)
class Prompts(Task):
    """Examples from a file: `.jsonl`, `.json`, `.csv`, `.tsv` (these also with `.gz`), `.parquet`, or a folder saved by
    Hugging Face datasets.

    Rows are `{"prompt": ..., "answer": ...}`, rows of a known benchmark (see `tasks/files/formats.py`), or rows with
    the fields named here.

    Args:
        path: the file.
        count: how many examples to read, from the start; None reads all. A row of several questions gives several.
        prompt_field: the field of the prompt, with dots into objects (`doc.question`), or a template with fields in
            braces (`{context} Question: {question}`).
        answer_field: the field of the answer, or of a list of accepted ones.
        turns: the mode of rows with several questions on one context (SCBench): "multi-turn" puts the earlier questions
            and their right answers before each question, "multi-request" asks each of the context alone.

    Raises:
        TaskError: if the file or a row cannot be used; the message names the line.
    """

    path: Path
    count: int | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    turns: str = "multi-turn"

    def __post_init__(self) -> None:
        validate.one_of("turns", self.turns, scbench.MODES)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def metric(self) -> str:
        """The rule that all examples share, or else the score that fits the first row's format."""
        return self._read[1]

    def examples(self) -> list[Example]:
        return list(self._read[0])

    @cached_property
    def _read(self) -> tuple[tuple[Example, ...], str]:
        found: list[Example] = []
        metric = ""
        for place, row in records.read(self.path):
            where = f"task={str(self.path)!r} {place}"
            examples, fitting = rows.examples(
                row, where, self.prompt_field, self.answer_field, str(self.path), self.turns
            )
            found += examples
            metric = metric or fitting
            if self.count is not None and len(found) >= self.count:
                break
        if not found:
            raise TaskError(f"task={str(self.path)!r} holds no examples; it must hold at least one")
        found = scbench.with_functions(found)[: self.count]
        rules = [example.rule for example in found]
        return tuple(found), common(rules) if all(rules) else metric
