"""`foveate bench calibrate`: the speed of this machine's engines, measured and kept."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.console import Bar, duration, show
from foveate.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from foveate.bench.machine_speed import Calibrated

Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch. Default: as many as it uses.")]


def command(threads: Threads = None, as_json: Json = False) -> None:
    """Measure how fast this machine's engines are, so that `auto` chooses the fastest for block selections on a CPU.

    It takes about a minute, best on a quiet machine. The rates are kept
    in the cache folder, for this processor and number of threads. Results
    of operators do not depend on them.
    """
    with Bar("loading") as bar:
        from foveate.bench.machine_speed import calibrate

        found = calibrate(threads, bar.at)
    if as_json:
        typer.echo(_json(found))
    else:
        took = f"rates    {found.machine.source} ({found.machine.threads} threads, in {duration(found.seconds)})"
        show(_table(found), *found.notes, took)


def _json(found: Calibrated) -> str:
    rates = {name: {**work._asdict(), "median_error": found.errors[name]} for name, work in found.machine.rates.items()}
    return json.dumps({
        "file": str(found.machine.source), "threads": found.machine.threads, "seconds": round(found.seconds, 1),
        "notes": found.notes, "rates": rates,
    })  # fmt: skip


def _table(found: Calibrated) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("engine, dtype, pass", no_wrap=True)
    headings = "GFLOP/s", "G copied/s", "G indexed/s", "G masked/s", "call, µs", "error"
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, work in found.machine.rates.items():
        speeds = (_speed(2, work.products), *(_speed(1, each) for each in (work.copied, work.indexed, work.masked)))
        table.add_row(
            name, *speeds, f"{1e6 * work.calls:.3g}", f"{1e6 * work.planned:.3g}", f"{found.errors[name]:.0%}"
        )
    return table


def _speed(count: int, seconds: float) -> str:
    """Return billions a second; "-" for what takes no time that could be measured."""
    return f"{1e-9 * count / seconds:.3g}" if seconds else "-"
