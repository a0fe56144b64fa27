"""The comparison as tables for the terminal and for Markdown."""

from __future__ import annotations

import re

from foveate.bench.comparison.columns import Cell, cells, columns, ordered
from foveate.bench.comparison.results import Comparison
from foveate.bench.comparison.table import render, title
from foveate.pages.text import visible

__all__ = ["markdown", "render"]


def markdown(comparison: Comparison) -> str:
    """Return the same table as Markdown; the best number of each column is bold, intervals and ratios in brackets."""
    parts = comparison.parts()
    if len(parts) > 1:
        return "\n".join(f"{title(part).capitalize()}:\n\n{_markdown(part)}" for part in parts)
    return _markdown(comparison)


def _markdown(comparison: Comparison) -> str:
    heads = ["method", *(column.heading for column in columns(comparison))]
    lines = [_line(heads), _line(["---", *("---:" for _ in heads[1:])])]
    for row, line in zip(ordered(comparison), cells(comparison), strict=True):
        name = _escape(visible(row.method)) + (f" (failed: {_escape(visible(row.error))})" if row.error else "")
        lines.append(_line([name, *map(_markdown_cell, line)]))
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    remarks = ", ".join(filter(None, [cell.interval, cell.ratio, cell.spread]))
    return f"{text} ({remarks})" if remarks else text


def _line(parts: list[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _escape(text: str) -> str:
    """Escape the characters that Markdown, or HTML in it, would interpret."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~<>&])", r"\\\1", text)
