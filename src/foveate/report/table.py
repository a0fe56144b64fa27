"""The comparison as tables for the terminal and for Markdown."""

from __future__ import annotations

import re

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.comparison.results import Comparison
from foveate.pages.text import visible
from foveate.report.columns import Cell, cells, columns, ordered, percent


def render(comparison: Comparison) -> RenderableType:
    """Build a table with two lines per method, the baseline first: numbers, and below them intervals and ratios, dim.

    The best number of each column is bold. `rich.print(render(comparison))` prints it. Markup and control codes in
    names are shown as text. Several budgets have a table each.
    """
    parts = comparison.parts()
    if len(parts) == 1:
        return _table(comparison)
    lines: list[RenderableType] = []
    for part in parts:
        lines += [Text(_title(part), style="bold"), _table(part), ""]
    return Group(*lines[:-1])


def _title(part: Comparison) -> str:
    return f"at {percent(part.budgets[0])} of the cache"


def _table(comparison: Comparison) -> Table:
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


def markdown(comparison: Comparison) -> str:
    """Return the same table as Markdown; the best number of each column is bold, intervals and ratios in brackets."""
    parts = comparison.parts()
    if len(parts) > 1:
        return "\n".join(f"{_title(part).capitalize()}:\n\n{_markdown(part)}" for part in parts)
    return _markdown(comparison)


def _markdown(comparison: Comparison) -> str:
    heads = ["method", *(column.heading for column in columns(comparison))]
    lines = [_line(heads), _line(["---", *("---:" for _ in heads[1:])])]
    for row, line in zip(ordered(comparison), cells(comparison), strict=True):
        name = _escape(visible(row.method)) + (f" (failed: {_escape(visible(row.error))})" if row.error else "")
        lines.append(_line([name, *map(_markdown_cell, line)]))
    return "\n".join(lines) + "\n"


def _rich_cell(cell: Cell) -> Text:
    text = Text().append(cell.text, style="bold green" if cell.best else "")
    return text.append(f"\n{cell.remark}", style="dim") if cell.remark else text


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    remarks = ", ".join(filter(None, [cell.interval, cell.ratio, cell.spread]))
    return f"{text} ({remarks})" if remarks else text


def _line(parts: list[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _escape(text: str) -> str:
    """Escape the characters that Markdown, or HTML in it, would interpret."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~<>&])", r"\\\1", text)
