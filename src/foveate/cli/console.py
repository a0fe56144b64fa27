"""Output, progress and error handling of all commands."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from foveate.bench.parts import printed
from foveate.core.errors import FoveateError, Interrupted

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID


class CommandGroup(TyperGroup):
    """A group of commands: a `FoveateError` prints one line on stderr and exits with 2, Ctrl-C exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _sigterm_as_interrupt():
                return super().invoke(ctx)
        except FoveateError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(1) from None


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that results are kept and reported."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def explained(describe: Callable[[KeyboardInterrupt], str]) -> Iterator[None]:
    """Let an interrupt of the block print what the run keeps, as `describe` puts it, and exit with 1."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        typer.echo(describe(interrupt), err=True)
        raise typer.Exit(1) from None


def what_is_kept(interrupt: KeyboardInterrupt, things: str, out: Path, *, of_all: bool = True) -> str:
    """Describe what an interrupted run keeps.

    Args:
        interrupt: the interrupt.
        things: what the run finishes one by one, such as "answers".
        out: the folder that keeps them.
        of_all: whether the number of all is known.
    """
    if not isinstance(interrupt, Interrupted) or not interrupt.done:
        return f"interrupted before any of the {things} was finished"
    found = f"{interrupt.done} of {interrupt.total}" if of_all else f"{interrupt.done}"
    return f"interrupted: {found} {things} are kept in {out}; run the same command to resume"


def show(*items: RenderableType) -> None:
    """Print to stdout with the terminal's width, or 120 columns without a terminal."""
    console = printed.console()
    for item in items:
        console.print(item, markup=False, highlight=False)


def width() -> int:
    """Return the columns that `show` has."""
    return printed.console().width


class Bar:
    """A progress bar on stderr, so that stdout has only the result. Use it in a `with`.

    It shows the elapsed and the remaining time. If stderr is not a terminal, it prints a line periodically instead.
    """

    def __init__(self, label: str) -> None:
        self._label, self._done = label, 0
        self._total: int | None = None
        self._view: _TerminalBar | _LogLines = _TerminalBar(label) if sys.stderr.isatty() else _LogLines(label)

    def __enter__(self) -> Bar:
        self._view.begin()
        return self

    def __exit__(self, *raised: object) -> None:
        self._view.end()

    def start(self, total: int) -> None:
        """Set the number of steps, once they begin."""
        self._label = "running"
        self.at(0, total, "")

    def advance(self, label: str = "") -> None:
        """Count one finished step; `label` describes it."""
        self.at(self._done + 1, self._total, label)

    def say(self, label: str) -> None:
        """Show a message between steps."""
        self.at(self._done, self._total, label)

    def at(self, step: int, steps: int | None, note: str) -> None:
        """Show that `step` of `steps` are done, for work that counts its own steps."""
        self._done, self._total = step, steps
        self._view.at(step, steps, note or self._label)


class _TerminalBar:
    """A progress bar on a terminal."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left:"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar: Progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID = self._bar.add_task(label, total=None)

    def begin(self) -> None:
        self._bar.start()

    def end(self) -> None:
        self._bar.stop()

    def at(self, step: int, steps: int | None, label: str) -> None:
        self._bar.update(self._task, completed=step, total=steps, description=label)


class _LogLines:
    """Lines of progress for a log: the first after 5 seconds, then one every 30 seconds."""

    FIRST, EVERY = 5.0, 30.0

    def __init__(self, label: str) -> None:
        self._start = self._counted = time.monotonic()
        self._due, self._first = self._start + self.FIRST, -1

    def begin(self) -> None:
        """Print nothing, so that short work stays silent."""

    def end(self) -> None:
        """Print nothing; the result follows."""

    def at(self, step: int, steps: int | None, label: str) -> None:
        now = time.monotonic()
        if steps is not None and (self._first < 0 or step < self._first):
            self._counted, self._first = now, step  # an earlier run's steps do not count for the speed
        if now < self._due:
            return
        self._due = now + self.EVERY
        parts = [label]
        if steps is not None:
            parts.append(f"{step} of {steps}, {duration(now - self._start)}")
            if step > self._first:
                left = (now - self._counted) / (step - self._first) * (steps - step)
                parts.append(f"about {duration(left)} left")
        typer.echo(", ".join(parts), err=True)


def duration(seconds: float) -> str:
    """Format seconds for people: "9.9 s", "1 min 1 s", "2 h 1 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
