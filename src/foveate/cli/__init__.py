"""The `foveate` command. Its modules import heavy packages inside the commands, so that `--help` does not load torch.

Exit codes: 0 success; 1 interrupted, or a bug (with its traceback); 2 unusable input, explained in one line; 3 a
statement of a study does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import foveate
from foveate.cli import bench, cite, compare, heads, labs, look, run, study, systems, train, tune
from foveate.cli.console import CommandGroup
from foveate.tasks.registry import TASKS as NAMED

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare.command)
app.command("tune")(tune.command)
app.command("run")(run.command)
app.command("train", epilog=train.listing())(train.command)
app.command("look")(look.command)
app.command("heads")(heads.command)
app.command("study")(study.command)
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
    """Attention mechanisms for pretrained models and new ones: cost and quality of each."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command with `args`, or with the process's arguments, and exit."""
    app(args)
