"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.config import read

Device = Annotated[str, typer.Option(help="Device of the networks: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Number format: float32, bfloat16, float16.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="A TOML file with any of these options (seed = 1); the command line takes precedence.",
        callback=read, is_eager=True,
    ),
]  # fmt: skip
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again, and replace earlier results in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print only the results, as JSON, on stdout.")]
