"""`foveate bench sparse`: every sparse operator against fused dense attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.console import Bar, explained, show, what_is_kept
from foveate.cli.options import Config, Device, Dtype, Fresh, Json
from foveate.core.errors import OptionError

Lengths = Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")]
Operators = Annotated[str | None, typer.Option(help="Keys, separated by commas. Default: every sparse operator.")]
Budget = Annotated[float, typer.Option(help="Share of the keys that operators are asked to read, in (0, 1].")]
Heads = Annotated[int, typer.Option(help="Heads of random inputs.")]
Dim = Annotated[int, typer.Option(help="Channels of a head of random inputs.")]
Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch. Default: as many as it uses.")]
Rounds = Annotated[int, typer.Option(help="Rounds in which all operators and dense attention take turns.")]
Inputs = Annotated[
    str, typer.Option(help="random, or a safetensors file with q, k and v; the error is then measured on them too.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Folder, GGUF file or hub id of a decoder whose queries, keys and values the error is measured on. "
        "Default: the included lab model."
    ),
]
Tokens = Annotated[int, typer.Option(help="Tokens that the model reads, once; longer calls have no error.")]
Out = Annotated[Path, typer.Option(help="Folder for sparse.json and sparse.svg.")]


def command(
    lengths: Lengths = "1024,2048,4096,8192,16384,32768",
    operators: Operators = None,
    budget: Budget = 0.125,
    heads: Heads = 4,
    dim: Dim = 64,
    threads: Threads = None,
    rounds: Rounds = 5,
    inputs: Inputs = "random",
    model: Model = None,
    tokens: Tokens = 4096,
    out: Out = Path("foveate-sparse"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Time every sparse operator against fused dense attention, in turns, and measure its error on real tensors.

    Each row has the achieved and the ideal speed-up, which is that of the
    chosen pairs alone, and the share of it that is reached; also where
    dense attention is faster. Results are saved after each length, and the
    same command resumes after an interruption. With the default lengths it
    takes about a quarter of an hour on one core.
    """
    counts = _counts(lengths)
    keys = None if operators is None else [key.strip() for key in operators.split(",") if key.strip()]
    with explained(lambda interrupt: what_is_kept(interrupt, "rows", out)), Bar("loading") as bar:
        from foveate.bench.parts.folder import lock_folder
        from foveate.bench.sparsity.results import RESULTS
        from foveate.bench.sparsity.run import sparse
        from foveate.report import sparse as report

        with lock_folder(out):
            found = sparse(
                lengths=counts, operators=keys, budget=budget, heads=heads, dim=dim, dtype=dtype, device=device,
                threads=threads, rounds=rounds, inputs=inputs, model=model, tokens=tokens, out=out, fresh=fresh,
                progress=bar.at, say=bar.say,
            )  # fmt: skip
            plot = report.plot(found, out / "sparse.svg")
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        show(report.table(found), "", f"plot     {plot}", f"results  {out / RESULTS}")


def _counts(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise OptionError(f"lengths={text!r} must be whole numbers, separated by commas") from None
