"""Rows as a file for other programs: CSV, or Parquet with pyarrow."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.bench.parts.plaindata import draft_and_move, write_atomic


def write_table(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, type], target: Path) -> Path:
    """Write rows to a `.parquet` file, or else as CSV.

    Numbers that are not finite become empty, and lone surrogates question marks.

    Args:
        rows: values by column; a column without a value is empty.
        kinds: the columns in order, each with `str`, `int` or `float`.
        target: the file; missing folders are created.
    """
    lines = [{name: _plain(row.get(name)) for name in kinds} for row in rows]
    return _write_parquet(lines, kinds, target) if target.suffix == ".parquet" else _write_csv(lines, kinds, target)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _write_csv(lines: list[dict[str, Any]], kinds: Mapping[str, type], target: Path) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(kinds), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return write_atomic(target, text.getvalue())


def _write_parquet(lines: list[dict[str, Any]], kinds: Mapping[str, type], target: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])
    table = pyarrow.Table.from_pylist(lines, schema)
    return draft_and_move(target, lambda draft: parquet.write_table(table, draft))
