"""`foveate bench policies`: every cache policy on the user's own decoders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import Bar, show
from foveate.cli.options import Config, Device, Dtype, Fresh, Json
from foveate.core.errors import OptionError

Model = Annotated[list[str], typer.Option(help="Folder, GGUF file or hub id of a decoder; repeat it for several.")]
Quick = Annotated[bool, typer.Option("--quick", help="Run for a few minutes: one budget, fewer and shorter prompts.")]
Methods = Annotated[str | None, typer.Option(help="Keys of cache policies, with commas. Default: all.")]
Budgets = Annotated[str | None, typer.Option(help="Shares of the full cache, with commas. Default: 0.25.")]
Tasks = Annotated[str | None, typer.Option(help="Retrieval tasks, with commas; NAME@CHARACTERS for another length.")]
Examples = Annotated[int | None, typer.Option(help="Prompts per task.")]
Characters = Annotated[int | None, typer.Option(help="Length of retrieval prompts in characters.")]
Losses = Annotated[str | None, typer.Option(help="Context lengths in tokens for the loss, with commas.")]
Times = Annotated[str | None, typer.Option(help="Lengths in tokens of the timed prompts, with commas.")]
Out = Annotated[
    Path,
    typer.Option(
        help="Folder for the journal, policies.json and policies.md; what a policy learns of a model is kept "
        "beside its weights."
    ),
]


def command(
    model: Model,
    quick: Quick = False,
    methods: Methods = None,
    budgets: Budgets = None,
    tasks: Tasks = None,
    examples: Examples = None,
    characters: Characters = None,
    losses: Losses = None,
    times: Times = None,
    out: Out = Path("foveate-policies"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    config: Config = None,
    as_json: Json = False,
    fresh: Fresh = False,
) -> None:
    """Run every cache policy on your decoders at several budgets: retrieval, loss on long text, memory and time.

    Scores have intervals, and times are ratios within the same round.
    Results are saved at once, and the same command resumes after an
    interruption.
    """
    given: dict[str, Any] = {
        "methods": _words(methods), "budgets": _numbers("budgets", budgets, float), "tasks": _words(tasks),
        "examples": examples, "characters": characters,
        "losses": _numbers("losses", losses, int), "times": _numbers("times", times, int),
    }  # fmt: skip
    try:
        with Bar("loading") as bar:
            from foveate.bench.policies import plan
            from foveate.bench.policies.run import RESULTS, run

            sizes = replace(
                plan.quick() if quick else plan.whole(), **{k: v for k, v in given.items() if v is not None}
            )
            found = run(model, sizes, out, bar, dtype=dtype, device=device, fresh=fresh)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: finished results are kept in {out}; run the same command to resume", err=True)
        raise typer.Exit(1) from None
    from foveate.report import policies

    page = out / "policies.md"
    page.write_text(policies.page(found), "utf-8")
    if as_json:
        typer.echo(json.dumps(found))
    else:
        show(policies.short(found), f"page     {page}", f"results  {out / RESULTS}")


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str | None, kind: type) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(kind(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise OptionError(f"{option}={text!r} must be numbers, separated by commas") from None
