"""Options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.config import read

Device = Annotated[str, typer.Option(help="Where networks run: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="What they compute in: float32, bfloat16, float16.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="A TOML file with any of these options (seed = 1); those on the command line win.",
        callback=read, is_eager=True,
    ),
]  # fmt: skip
Fresh = Annotated[bool, typer.Option("--fresh", help="Do again what an earlier run has left in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, on stdout.")]
