"""`foveate heads`: what each attention head of a model is for, found once and kept for cache policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.console import Bar, duration, show
from foveate.cli.options import Config, Device, Dtype, Fresh, Json

Model = Annotated[
    str | None, typer.Option(help="Folder, GGUF file or hub id of a decoder. Default: the included lab model.")
]
Method = Annotated[
    str,
    typer.Option(
        help="duo: gates by distillation (DuoAttention); razor: echo and induction on random tokens (RazorAttention); "
        "moa: spans by the influence of attention (MoA); retrieval: how often a head looks at what is copied."
    ),
]
Pattern = Annotated[
    Path | None,
    typer.Option(help="For duo: a folder of DuoAttention's published format, read instead of training gates."),
]
Length = Annotated[int | None, typer.Option(help="Approximate tokens (needles: characters) of each text.")]
Items = Annotated[int | None, typer.Option(help="Number of texts; for duo, steps of training.")]
Out = Annotated[Path, typer.Option(help="Folder for the safetensors file, the picture and the state of the work.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the model's folder run.")]


def command(
    model: Model = None,
    method: Method = "duo",
    pattern: Pattern = None,
    length: Length = None,
    items: Items = None,
    out: Out = Path("foveate-heads"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    config: Config = None,
    as_json: Json = False,
    fresh: Fresh = False,
) -> None:
    """Identify a model's heads, once: which retrieve and need the whole cache, and which look at few tokens.

    The result is kept as safetensors with the model's digest; beside the checkpoint, or in the --out folder of
    `foveate compare`, policies find it. The same command shows it again, and resumes after an interruption.
    """
    try:
        with Bar("loading") as bar:
            from foveate.bench import heads

            own = heads.usual(method)
            sizes = heads.Sizes(own.length if length is None else length, own.items if items is None else items)
            found = heads.identify(
                model, method, out, sizes=sizes, pattern=pattern, device=device, dtype=dtype,
                trust_remote_code=trust_remote_code, fresh=fresh, progress=bar.at, say=bar.say,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"interrupted: what is finished is kept in {out}; run the same command to resume", err=True)
        raise typer.Exit(1) from None
    from foveate.report import heads as report

    page = report.page(found, out / f"{method}.html")
    if as_json:
        tables = {name: [[round(x, 6) for x in row] for row in table.tolist()] for name, table in found.tables.items()}
        typer.echo(json.dumps({
            "model": found.model, "method": method, "layers": found.layers, "heads": found.kind, "tables": tables,
            "file": str(found.file), "page": str(page), "seconds": round(found.seconds, 1),
        }))  # fmt: skip
    else:
        took = f"found in {duration(found.seconds)}" if found.seconds else "from an earlier run; --fresh does it again"
        show(*report.lines(found), f"picture  {page}", f"heads    {found.file} ({took})")
