"""What the commands share: where they print, how they show progress, and how they fail."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
            with _terminated_as_interrupted():
                return super().invoke(ctx)
        except FoveateError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(1) from None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A request to terminate (SIGTERM) is handled as Ctrl-C is: what was measured is kept, and said to be."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(*what: RenderableType) -> None:
    """Print to stdout, as wide as the terminal is, or wide enough for a table where there is none."""
    console = _console()
    for item in what:
        console.print(item, markup=False, highlight=False)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


class Bar:
    """A progress bar on stderr, so that stdout holds nothing but the result. Use it in a `with`.

    It shows the time that has passed and the time that is left. Where stderr is no terminal, a line now and then takes
    its place.
    """

    def __init__(self, label: str) -> None:
        self._label, self._done = label, 0
        self._total: int | None = None
        self._shown: _Drawn | _Lines = _Drawn(label) if sys.stderr.isatty() else _Lines(label)

    def __enter__(self) -> Bar:
        self._shown.begin()
        return self

    def __exit__(self, *raised: object) -> None:
        self._shown.end()

    def start(self, total: int) -> None:
        """How many steps there will be."""
        self.at(0, total, "")

    def advance(self, label: str = "") -> None:
        """One step is done; `label` says what the work is at."""
        self.at(self._done + 1, self._total, label)

    def say(self, label: str) -> None:
        """What the work is at, between steps."""
        self.at(self._done, self._total, label)

    def at(self, step: int, steps: int | None, note: str) -> None:
        """The same for work that counts for itself: `step` of `steps` are done."""
        self._done, self._total = step, steps
        self._shown.at(step, steps, note or self._label)


class _Drawn:
    """A bar on a terminal."""

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


class _Lines:
    """A line now and then, where nobody watches a bar: after a few seconds, and then every half minute."""

    FIRST, EVERY = 5.0, 30.0

    def __init__(self, label: str) -> None:
        self._begun = self._counted = time.monotonic()
        self._due, self._first = self._begun + self.FIRST, -1

    def begin(self) -> None:
        """Nothing: short work stays silent."""

    def end(self) -> None:
        """Nothing: the result says that it is done."""

    def at(self, step: int, steps: int | None, label: str) -> None:
        now = time.monotonic()
        if steps is not None and (self._first < 0 or step < self._first):
            self._counted, self._first = now, step  # what an earlier run did tells nothing of this one's speed
        if now < self._due:
            return
        self._due = now + self.EVERY
        parts = [label]
        if steps is not None:
            parts.append(f"{step} of {steps}, {duration(now - self._begun)}")
            if step > self._first:
                left = (now - self._counted) / (step - self._first) * (steps - step)
                parts.append(f"about {duration(left)} left")
        typer.echo(", ".join(parts), err=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
