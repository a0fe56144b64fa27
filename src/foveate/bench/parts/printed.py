"""Results as `print`, notebooks and the command line show them."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_WIDTH = 120
_PRE = '<pre style="line-height: 1.2; white-space: pre; overflow-x: auto">{code}</pre>'


def console(**options: Any) -> Console:
    """Return a console with the terminal's width, or 120 columns if the output does not go to a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, **options)


def plain(*items: RenderableType) -> str:
    """Return items as text without colours."""
    file = StringIO()
    _print(console(file=file, force_terminal=False, no_color=True), items)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def html(*items: RenderableType) -> str:
    """Return items as HTML for a notebook, with their styles."""
    recorded = console(file=StringIO(), force_terminal=False, record=True)
    _print(recorded, items)
    return recorded.export_html(inline_styles=True, code_format=_PRE)


def _print(console: Console, items: tuple[RenderableType, ...]) -> None:
    for item in items:
        console.print(item, markup=False, highlight=False)
