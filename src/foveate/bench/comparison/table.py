"""The comparison as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.comparison.columns import Cell, cells, columns, ordered, percent
from foveate.bench.comparison.measured import Measured
from foveate.pages.text import visible


def render(comparison: Measured) -> RenderableType:
    """Build a table with two lines per method, the baseline first: numbers, and below them intervals and ratios, dim.

    The best number of each column is bold. `rich.print(render(comparison))` prints it. Markup and control codes in
    names are shown as text. Several budgets have a table each.
    """
    parts = comparison.parts()
    if len(parts) == 1:
        return _table(comparison)
    lines: list[RenderableType] = []
    for part in parts:
        lines += [Text(title(part), style="bold"), _table(part), ""]
    return Group(*lines[:-1])


def title(part: Measured) -> str:
    """Return the heading of the part of one budget."""
    return f"at {percent(part.budgets[0])} of the cache"


def _table(comparison: Measured) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    for column in columns(comparison):
        # Wide enough for any number, so that in a narrow terminal only the remarks wrap.
        table.add_column(column.heading, justify="right", min_width=7)
    for row, line in zip(ordered(comparison), cells(comparison), strict=True):
        name = Text(visible(row.method), style="bold" if row.method == comparison.baseline else "")
        if row.error:
            name.append("\nfailed" if not row.answers else "\nfailed in part", style="not bold red")
        table.add_row(name, *map(_rich_cell, line))
    return table


def _rich_cell(cell: Cell) -> Text:
    text = Text().append(cell.text, style="bold green" if cell.best else "")
    return text.append(f"\n{cell.remark}", style="dim") if cell.remark else text
