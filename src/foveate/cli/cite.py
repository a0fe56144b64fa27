"""`foveate cite KEY...`: BibTeX of systems by their keys, without importing torch."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.core.cite import cite

Keys = Annotated[list[str], typer.Argument(help="Keys of systems, as `foveate systems` lists them.")]


def command(keys: Keys) -> None:
    """Print BibTeX of the systems' papers, each paper once."""
    typer.echo(cite(*keys), nl=False)
