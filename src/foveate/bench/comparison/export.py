"""A comparison as a file for other programs, one line for each answer: CSV, or Parquet with pyarrow."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foveate.bench.comparison.results import Answer, Comparison, Row
from foveate.bench.parts.table_file import write_table
from foveate.core.errors import OptionError

ENDINGS = (".csv", ".parquet")
_RUN = ("model", "task", "metric", "seed", "device", "dtype", "batch")
_ANSWER = (
    "score", "tokens", "cache_kept", "keys_read", "prefill_ms", "decode_ms", "base_prefill_ms", "base_decode_ms",
    "agnostic_score", "answer_tokens",
)  # fmt: skip
_TEXTS = (
    "model",
    "task",
    "metric",
    "device",
    "dtype",
    "method",
    "title",
    "expected",
    "output",
    "agnostic_output",
    "error",
)
_WHOLE = ("seed", "batch", "example", "tokens")
COLUMNS = (
    *_RUN, "method", "title", "budget", "example", *_ANSWER, "memory_mb", "peak_mb", "dropped", "expected", "output",
    "agnostic_output", "error",
)  # fmt: skip
_KINDS = {name: str if name in _TEXTS else int if name in _WHOLE else float for name in COLUMNS}


def check(path: Path) -> None:
    """Refuse a file that cannot be written, before anything runs."""
    if path.suffix not in ENDINGS:
        raise OptionError(f"export={str(path)!r} must end in {' or '.join(ENDINGS)}")
    if path.is_dir():
        raise OptionError(f"export={str(path)!r} is a folder; it must be a file")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise OptionError(
            f"export={str(path)!r} needs pyarrow: pip install 'foveate[data]'; a .csv file needs no package"
        )


def export(comparison: Comparison, path: str | os.PathLike) -> Path:
    """Write a line for each answer of each method at each budget; a method without answers has one line with its error.

    Examples are counted from 0 in the order of the task. Missing numbers are empty. `dropped` is the share that
    `compare(lost=True)` found, for the examples that it read. Prompts are left out.
    """
    target = Path(path)
    check(target)
    lines = [line for row in comparison.rows for line in _lines(comparison, row)]
    return write_table(lines, _KINDS, target)


def _lines(comparison: Comparison, row: Row) -> list[dict[str, Any]]:
    run = {name: getattr(comparison, name) for name in _RUN}
    method = {name: getattr(row, name) for name in ("method", "title", "budget", "memory_mb", "peak_mb")}
    dropped = {example.example: example.dropped for example in row.lost}
    if not row.answers:
        return [{**run, **method, "error": row.error}]
    return [
        {**run, **method, "example": index, "dropped": dropped.get(index), **_answer(answer)}
        for index, answer in enumerate(row.answers)
    ]


def _answer(answer: Answer) -> dict[str, Any]:
    return {name: getattr(answer, name) for name in (*_ANSWER, "expected", "output", "agnostic_output", "error")}
