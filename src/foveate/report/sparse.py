"""Sparse operators against dense attention: a table for the terminal and a plot."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from foveate.bench.parts.plaindata import write_atomic
from foveate.pages.plot import Line, drawn

if TYPE_CHECKING:
    from foveate.bench.sparsity.results import Sparse, SparseRow


def table(found: Sparse) -> Table:
    """Return the table, one row for each operator and length; rows where dense attention is faster are dim."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("operator", no_wrap=True)
    for heading in ("tokens", "engine", "ms", "dense ms", "faster", "spread", "ideal", "of the ideal", "error"):
        shown.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in found.rows:
        if row.note:
            shown.add_row(row.operator, f"{row.length:,}", Text(row.note, style="red"))
        else:
            shown.add_row(row.operator, *_cells(row), style="dim" if row.speedup < 1 else "")
    slower = sum(row.speedup < 1 for row in found.rows)
    shown.caption = f"Dense attention is faster in {slower} of {len(found.rows)} rows."
    shown.caption_justify = "left"
    return shown


def _cells(row: SparseRow) -> list[str]:
    return [
        f"{row.length:,}", row.engine, f"{row.ms:.3g}", f"{row.dense_ms:.3g}", f"{row.speedup:.2f}×",
        f"{row.speedup_low:.2f}–{row.speedup_high:.2f}", f"{row.ideal:.3g}×", f"{row.ratio:.2f}",
        "-" if isnan(row.error) else f"{row.error:.3f}",
    ]  # fmt: skip


def plot(found: Sparse, path: Path) -> Path:
    """Draw the speed-ups over lengths, and the ideal ones dashed, as SVG at `path`."""
    lines = []
    for key in dict.fromkeys(row.operator for row in found.rows):
        rows = sorted((row for row in found.rows if row.operator == key), key=lambda row: row.length)
        speedups, ideals = [row.speedup for row in rows], [row.ideal for row in rows]
        lines.append(Line(key, [row.length for row in rows], speedups, ideals))
    title = "Speed-up of sparse operators over fused dense attention"
    drawing = drawn(lines, title, "tokens", "times as fast as dense attention", log_x=True, log_y=True, dashed="ideal")
    return write_atomic(path, drawing + "\n")
