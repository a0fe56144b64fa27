"""The `foveate` command. Its modules import what is heavy inside the commands: `--help` need not wait for torch.

Exit codes: 0 done; 1 interrupted, or a bug (with its traceback); 2 input that cannot be used, said in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import foveate
from foveate.cli import bench, cite, compare, labs, systems, train
from foveate.cli.console import PolitelyFailing
from foveate.tasks.registry import TASKS as NAMED

app = typer.Typer(
    cls=PolitelyFailing,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare.command)
app.command("train", epilog=train.listing())(train.command)
app.command("systems")(systems.command)
app.command("cite")(cite.command)
app.add_typer(bench.app, name="bench")
app.add_typer(labs.app, name="labs")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveate {foveate.__version__}")
        raise typer.Exit


@app.callback(epilog="\n\n".join([train.policies(), f"Tasks of compare: {', '.join(NAMED)}.", train.listing()]))
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Attention mechanisms for pretrained models and new ones: what each costs, and what it loses."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with `args`, or with those of the process, and exit."""
    app(args)
