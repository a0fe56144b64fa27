"""`foveate study`: the experiment that shows a paper's statements, as lines, as a page with plots, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.console import Bar, duration, show
from foveate.cli.options import Config, Json
from foveate.core import catalog
from foveate.core.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

Key = Annotated[str | None, typer.Argument(help="The study's key, as --list shows it.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Small sizes that take a few seconds; statements may fail at them.")
]
Listing = Annotated[bool, typer.Option("--list", help="List the studies.")]
Out = Annotated[Path, typer.Option(help="Folder for KEY.html and KEY.json.")]

#: The exit code where a statement does not hold.
FAILS = 3


def command(
    key: Key = None,
    seed: Seed = 0,
    quick: Quick = False,
    listing: Listing = False,
    out: Out = Path("foveate-study"),
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Run a paper's experiment on this machine: each statement, its prediction, the measurement and whether it holds.

    It takes under two minutes on two cores. The page has the measured
    and the predicted curves, and works offline. The exit code is 3 if a
    statement does not hold.
    """
    if listing:
        _list(as_json)
        return
    if key is None:
        raise OptionError("KEY must name a study; `foveate study --list` shows them")
    row = catalog.system(key)
    with Bar("loading") as bar:
        from foveate.bench.parts.folder import lock_folder
        from foveate.bench.parts.plaindata import write_atomic
        from foveate.report import study as report
        from foveate.studies.base.study import study_of

        cls = study_of(key)
        with lock_folder(out):
            bar.say("running")
            found = (cls.example() if quick else cls()).run(seed, bar.at)
            page = report.write(row, found, out / f"{key}.html", quick=quick)
            results = write_atomic(out / f"{key}.json", report.to_json(row, found, quick=quick))
    if as_json:
        typer.echo(report.to_json(row, found, quick=quick), nl=False)
    else:
        took = f"in {duration(found.seconds)}"
        show(*report.lines(row, found), "", f"page     {page}", f"results  {results} ({took})")
    if not found.holds:
        raise typer.Exit(FAILS)


def _list(as_json: bool) -> None:
    rows = catalog.systems("studies")
    if as_json:
        typer.echo(json.dumps([{"key": row.key, "title": row.title, "url": row.url} for row in rows], indent=1))
    else:
        show(_table(rows), "`foveate study KEY` runs one")


def _table(rows: list[catalog.System]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("key", "year", "title"):
        table.add_column(heading, no_wrap=heading != "title")
    for row in rows:
        key = Text(row.key, style=f"bold link {row.url}" if row.url else "bold")
        table.add_row(key, str(row.year), Text(row.title))
    return table
