"""What the commands share: where they print, how they show progress, and how they fail."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from foveate.core.errors import FoveateError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

_PIPE_WIDTH = 120


class PolitelyFailing(TyperGroup):
    """A group of commands in which a `FoveateError` is one line on stderr and exit code 2, and Ctrl-C exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoveateError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(1) from None


def show(*what: RenderableType) -> None:
    """Print to stdout, as wide as the terminal is, or wide enough for a table where there is none."""
    console = _console()
    for item in what:
        console.print(item, markup=False, highlight=False)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


class Bar:
    """A progress bar on stderr, so that stdout holds nothing but the result. Use it in a `with`."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        label_column = TextColumn("{task.description}", markup=False)
        columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar: Progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._label = label
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._bar.start()
        self._task = self._bar.add_task(self._label, total=None)
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def start(self, total: int) -> None:
        """How many steps there will be."""
        if self._task is not None:
            self._bar.reset(self._task, total=total)

    def advance(self, label: str = "") -> None:
        """One step is done; `label` says what the work is at."""
        if self._task is not None:
            self._bar.update(self._task, advance=1, description=label or self._label)

    def say(self, label: str) -> None:
        """What the work is at, between steps."""
        if self._task is not None:
            self._bar.update(self._task, description=label)

    def at(self, step: int, steps: int, note: str) -> None:
        """The same for work that counts for itself: `step` of `steps` are done."""
        if self._task is not None:
            self._bar.update(self._task, completed=step, total=steps, description=note or self._label)
