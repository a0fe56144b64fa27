"""`foveate bench`: comparisons of operators and of cache policies, and the speed of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli import calibrate, policies, sparse
from foveate.cli.console import Bar, show, what_is_kept
from foveate.cli.options import Config, Fresh, Json

if TYPE_CHECKING:
    from rich.table import Table

    from foveate.bench.recall_figure import Recall

app = typer.Typer(help="Compare operators, or cache policies.", no_args_is_help=True)

Only = Annotated[str | None, typer.Option(help="Labels of networks, separated by semicolons. Default: all.")]
Length = Annotated[int, typer.Option(help="Tokens in a sequence.")]
Pairs = Annotated[int, typer.Option(help="Key-value pairs to remember.")]
Vocabulary = Annotated[int, typer.Option(help="Number of tokens in the vocabulary.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps per network.")]
Batch = Annotated[int, typer.Option(help="Sequences per step.")]
Rates = Annotated[str, typer.Option(help="Learning rates, separated by commas; each network is shown at its best one.")]
Seed = Annotated[int, typer.Option(help="Seed of parameters and batches.")]
Out = Annotated[Path, typer.Option(help="Folder for recall.html and recall.json.")]


@app.callback()
def _benches() -> None:
    """Compare operators, or cache policies."""


app.command("policies")(policies.command)
app.command("sparse")(sparse.command)
app.command("calibrate")(calibrate.command)


@app.command("recall")
def recall(
    only: Only = None,
    length: Length = 128,
    pairs: Pairs = 32,
    vocabulary: Vocabulary = 128,
    steps: Steps = 800,
    batch: Batch = 32,
    rates: Rates = "3e-3,1e-2,3e-2",
    seed: Seed = 0,
    out: Out = Path("foveate-recall"),
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure recall against state size: train every operator in the same small network on associative recall.

    All networks have as many parameters as the one with softmax attention. Each is shown at its best learning rate,
    chosen on validation examples. Results are saved after each training, and the same command resumes after an
    interruption. With the default sizes it takes about an hour on one core.
    """
    with Bar("loading") as bar:
        from foveate.bench import recall_figure as figure
        from foveate.bench.parts.folder import lock_folder
        from foveate.report import curves
        from foveate.tasks.training.mqar import MQAR
        from foveate.train.loop.loop import Schedule

        labels = None if only is None else [label.strip() for label in only.split(";") if label.strip()]
        task = MQAR(vocabulary=vocabulary, length=length, pairs=pairs)
        schedule = Schedule(steps=steps, batch=batch, seed=seed)
        try:
            with lock_folder(out):
                found = figure.recall(
                    task=task, schedule=schedule, rates=_numbers(rates), only=labels, out=out, fresh=fresh,
                    progress=bar.at,
                )  # fmt: skip
        except KeyboardInterrupt as interrupt:
            typer.echo(what_is_kept(interrupt, "trainings", out), err=True)
            raise typer.Exit(1) from None
        title = f"Recall of {pairs} pairs in {length} tokens against state"
        page = curves.recall(found.best(), title, out / "recall.html")
    if as_json:
        typer.echo((out / figure.RESULTS).read_text("utf-8"), nl=False)
    else:
        show(_table(found), f"plot     {page}", f"results  {out / figure.RESULTS}")


def _numbers(text: str) -> list[float]:
    from foveate.core.errors import OptionError

    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise OptionError(f"rates={text!r} must be numbers, separated by commas") from None


def _table(found: Recall) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for heading in ("recall", "state, bytes", "parameters", "rate", "seconds"):
        table.add_column(heading, justify="right")
    for point in found.best():
        numbers = f"{point.state_bytes:,}", f"{point.parameters:,}", f"{point.rate:g}", f"{point.seconds:.0f}"
        table.add_row(point.label, f"{point.accuracy:.1%}", *numbers)
    return table
