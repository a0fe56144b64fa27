"""`foveate labs`: the small models of the package, and their training."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import Bar, show
from foveate.core.errors import OptionError, UnsupportedModel, unknown

app = typer.Typer(help="The small models of the package.", invoke_without_command=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A lab's name, such as lm.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the checkpoint. Default: foveate-labs/NAME.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Replace a checkpoint that --out already holds.")]


@app.callback()
def _default(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is None:
        catalogue(as_json)


@app.command("list")
def catalogue(as_json: Json = False) -> None:
    """List the labs: name, task, parameters, size, folder."""
    from foveate.labs import LABS

    rows = [
        {
            "name": lab.name,
            "title": lab.title,
            "task": lab.task,
            "parameters": _parameters(lab.path / "model.safetensors"),
            "bytes": lab.size,
            "path": str(lab.path),
        }
        for lab in LABS.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        show(_table(rows))


@app.command()
def train(name: Name, out: Out = None, seed: Seed = None, fresh: Fresh = False) -> None:
    """Train a lab from scratch, on text that ships with Python. The language model takes about an hour on one core."""
    from foveate.labs import LABS

    if name not in LABS:
        raise unknown("lab", name, LABS)
    out = out or Path("foveate-labs") / name
    if (out / "model.safetensors").exists() and not fresh:
        raise OptionError(f"out={out} already holds a checkpoint; name another folder, or add --fresh to replace it")
    from foveate.bench.parts.folder import lock_folder

    with lock_folder(out), Bar(f"training {name}") as bar:
        measured = import_module(f"foveate.labs.{name}").train(out=out, seed=seed, progress=bar.at)
    shown = {key: value for key, value in measured.items() if isinstance(value, int | float)}
    show(f"{name} is in {out}", *(f"  {key}: {value}" for key, value in shown.items()))


def _parameters(weights: Path) -> int:
    """Count the parameters in a safetensors file by its header; 0 without a file."""
    if not weights.exists():
        return 0
    with weights.open("rb") as file:
        try:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return sum(_product(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, OverflowError, MemoryError, KeyError, TypeError, AttributeError):
            raise UnsupportedModel(f"{weights} is not a safetensors file") from None


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "title", "task", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    table.add_column("size", justify="right")
    table.add_column("folder", overflow="fold")
    for row in rows:
        present = row["bytes"] > 0
        millions = f"{row['parameters'] / 1e6:.2f} M" if present else "-"
        megabytes = f"{row['bytes'] / 1e6:.1f} MB" if present else "missing"
        cells = (row["name"], row["title"], row["task"], millions, megabytes, row["path"])
        table.add_row(*(Text(cell) for cell in cells))
    return table
