"""`foveate train`: a small network with any operator on any task."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.console import Bar, duration, show
from foveate.cli.options import Config, Device, Fresh, Json
from foveate.cli.stop import Stop
from foveate.core.catalog import cache_policies, capabilities, systems
from foveate.core.errors import Interrupted, OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from foveate.train.loop.job import Outcome

#: The tasks of `--task`, with descriptions; `foveate.train.loop.network.TRAINING_TASKS` has the tasks themselves.
TASKS = {
    "mqar": "multi-query associative recall",
    "copy": "copying a random string",
    "lm": "the next byte of English text",
    "digits": "handwritten digits, as images",
}

Op = Annotated[str, typer.Option("--op", help="Key of an operator or a layer; see the list below.")]
TaskName = Annotated[str, typer.Option("--task", help=f"{', '.join(TASKS)}.")]
Options = Annotated[
    str | None, typer.Option(help="The system's own options, such as 'window=32' or 'depth=1,chunk=8'.")
]
Dim = Annotated[int, typer.Option(help="Width of the network.")]
Heads = Annotated[int, typer.Option(help="Heads per layer.")]
Depth = Annotated[int, typer.Option(help="Number of layers.")]
Conv = Annotated[
    int | None,
    typer.Option(help="Width in tokens of the short convolution before an operator; 0 for none. Default: 4."),
]
Length = Annotated[int | None, typer.Option(help="Tokens in a sequence, for tasks with this option.")]
Pairs = Annotated[int | None, typer.Option(help="Key-value pairs (mqar).")]
Vocabulary = Annotated[int | None, typer.Option(help="Number of tokens in the vocabulary (mqar, copy).")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
Batch = Annotated[int, typer.Option(help="Sequences or images per step.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial parameters and of the batches.")]
Seeds = Annotated[
    str | None, typer.Option(help="Several seeds, such as '0,1,2': one network each, with mean and deviation.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for the network. Default: foveate-train/OP-TASK.")]


def command(
    op: Op,
    task: TaskName = "mqar",
    options: Options = None,
    dim: Dim = 64,
    heads: Heads = 2,
    depth: Depth = 2,
    conv: Conv = None,
    length: Length = None,
    pairs: Pairs = None,
    vocabulary: Vocabulary = None,
    steps: Steps = 1000,
    batch: Batch = 32,
    rate: Rate = 3e-3,
    seed: Seed = 0,
    seeds: Seeds = None,
    out: Out = None,
    device: Device = "cpu",
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a small network with any operator, and save it.

    It writes the weights as safetensors, loss.html and training.json.
    Token networks are Hugging Face checkpoints, which
    `foveate compare --model FOLDER` runs on their task.
    With softmax, 1,000 steps take a minute or two on two cores.
    Ctrl-C keeps the finished steps, and the same command resumes.
    """
    if seeds is not None and seed:
        raise OptionError(f"seed={seed} and seeds={seeds!r} exclude each other; give one of them")
    folder = out or Path("foveate-train") / f"{op}-{task}"
    with Bar("loading") as bar:
        from foveate.bench.loading import torch_device
        from foveate.bench.parts.folder import lock_folder
        from foveate.train.loop import network
        from foveate.train.loop.loop import Schedule
        from foveate.train.loop.seeds import Trainings

        training_task = network.training_task(task, length=length, pairs=pairs, vocabulary=vocabulary)
        spec = network.spec(op, training_task, dim=dim, heads=heads, depth=depth, conv=conv, options=parsed(options))
        schedule = Schedule(steps=steps, batch=batch, rate=rate, seed=seed)
        planned = Trainings(spec, training_task, schedule, folder, torch_device(device), _numbers(seeds))
        try:
            with lock_folder(folder), Stop() as stop:
                found = planned.run(fresh=fresh, stop=stop, progress=bar.at)
        except KeyboardInterrupt as interrupt:
            typer.echo(_kept(interrupt), err=True)
            raise typer.Exit(1) from None
        page, result = _write(f"{op} on {task}", folder, found, {"op": op, "task": task})
    if as_json:
        typer.echo(json.dumps({**result, "folder": str(folder)}))
    else:
        show(*_lines(found, result, planned.several), f"network  {folder}", f"loss     {page}")


def _write(title: str, folder: Path, found: dict[int, Outcome], names: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """Write the page of losses, and the file of several seeds; return the page and the result for --json."""
    from foveate.report import curves
    from foveate.train.loop.checkpoint import writing
    from foveate.train.loop.seeds import SEEDS, summary

    result = {**names, "parameters": next(iter(found.values())).parameters, **summary(found)}
    with writing(folder):
        page = curves.loss({seed: one.history for seed, one in found.items()}, title, folder / "loss.html")
        if len(found) > 1:
            (folder / SEEDS).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return page, result


def _lines(outcomes: dict[int, Outcome], result: dict[str, Any], several: bool) -> list[Any]:
    """Return the lines that the command prints at the end."""
    spread = "" if result["accuracy_deviation"] is None else f" ± {100 * result['accuracy_deviation']:.1f}"
    over = f" over {len(outcomes)} seeds" if several else ""
    first = (
        f"{result['op']} on {result['task']}: "
        f"accuracy {100 * result['accuracy']:.1f}{spread} % on held-out data{over}, "
        f"{result['parameters']:,} parameters, trained in {duration(sum(one.seconds for one in outcomes.values()))}"
    )
    lines: list[Any] = [first]
    if several:
        lines.append(_table(result["seeds"]))
    if earlier := [seed for seed, one in outcomes.items() if one.earlier]:
        which = f" (seeds {', '.join(map(str, earlier))})" if several else ""
        lines.append(f"trained by an earlier run{which}: --fresh trains again")
    return lines


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("seed", "accuracy", "loss", "time"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(str(row["seed"]), f"{row['accuracy']:.1%}", f"{row['loss']:.3f}", duration(row["seconds"]))
    return table


def _kept(interrupt: KeyboardInterrupt) -> str:
    """Describe what an interrupted training keeps."""
    if not isinstance(interrupt, Interrupted):
        return "interrupted at once; the steps since the last saved state are lost"
    if not interrupt.done:
        return "interrupted before the first step"
    reached = f"step {interrupt.done} of {interrupt.total}"
    return f"interrupted: {reached} is kept in {interrupt.folder}; run the same command to resume"


def _numbers(seeds: str | None) -> tuple[int, ...]:
    """Parse seeds separated by commas; None gives none."""
    try:
        found = tuple(int(part) for part in (seeds or "").split(",") if part.strip())
    except ValueError:
        raise OptionError(f"seeds={seeds!r} must be whole numbers, separated by commas") from None
    if seeds is not None and not found:
        raise OptionError(f"seeds={seeds!r} must be whole numbers, separated by commas; got none")
    return found


def parsed(options: str | None) -> dict[str, Any]:
    """Parse `window=32,form=exp,sizes=(1, 2)` to a dict; values that are not Python literals stay text."""
    text = options or ""
    found: dict[str, Any] = {}
    for part in _parts(text):
        name, equals, value = part.partition("=")
        if not part.strip():
            continue
        if not equals or not name.strip().isidentifier():
            raise OptionError(f"options={options!r} must be NAME=VALUE, separated by commas; got {part!r}")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def _parts(text: str) -> list[str]:
    """Split `text` at its commas, except those inside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def policies() -> str:
    """Return the list of cache policies at the end of the help."""
    return f"Cache policies: {', '.join(row.key for row in cache_policies())}."


def listing() -> str:
    """Return the list of operators, layers and tasks at the end of the help."""
    causal: dict[str, list[str]] = {"operator": [], "layer": []}
    others: list[str] = []
    for row in systems():
        able = capabilities(row.key)
        if able:
            of_tokens = "causal self" in able["patterns"]
            (causal[able["kind"]] if of_tokens else others).append(row.key)
    tasks = "; ".join(f"{name}: {words}" for name, words in TASKS.items())
    return "\n\n".join(
        [
            f"Operators: {', '.join(causal['operator'])}.",
            f"Layers: {', '.join(causal['layer'])}.",
            f"For images only (--task digits): {', '.join(others)}.",
            f"Tasks of train: {tasks}.",
        ]
    )
