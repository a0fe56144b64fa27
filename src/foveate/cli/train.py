"""`foveate train`: a small network with any operator on any task."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import Bar, show
from foveate.core.errors import OptionError

Op = Annotated[str, typer.Option("--op", help="Key of an operator or a layer: see `foveate systems`.")]
TaskName = Annotated[str, typer.Option("--task", help="mqar, copy, lm or digits.")]
Options = Annotated[
    str | None, typer.Option(help="The system's own options, such as 'window=32' or 'depth=1,chunk=8'.")
]
Dim = Annotated[int, typer.Option(help="Width of the network.")]
Heads = Annotated[int, typer.Option(help="Heads of each layer.")]
Depth = Annotated[int, typer.Option(help="Layers.")]
Conv = Annotated[
    int | None, typer.Option(help="Tokens that the short convolution before an operator sees; 0 for none. Default: 4.")
]
Length = Annotated[int | None, typer.Option(help="Tokens in a sequence, where the task has a choice.")]
Pairs = Annotated[int | None, typer.Option(help="Key-value pairs, of mqar.")]
Vocabulary = Annotated[int | None, typer.Option(help="Tokens that there are, of mqar and copy.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
Batch = Annotated[int, typer.Option(help="Sequences or images in each step.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Seed = Annotated[int, typer.Option(help="Seed of the first parameters and of the batches.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the network. Default: foveate-train/OP-TASK.")]
Device = Annotated[str, typer.Option(help="Where it trains: cpu, cuda, mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


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
    out: Out = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a small network with any operator, and save it.

    Writes the weights as safetensors, loss.html and training.json.
    Networks of tokens are Hugging Face checkpoints:
    `foveate compare --model FOLDER` runs them on their task.
    """
    folder = out or Path("foveate-train") / f"{op}-{task}"
    with Bar("loading") as bar:
        import torch

        from foveate.bench.loading import torch_device
        from foveate.report import curves
        from foveate.train import checkpoint, loop, network

        drill = network.drill(task, length=length, pairs=pairs, vocabulary=vocabulary)
        spec = network.spec(op, drill, dim=dim, heads=heads, depth=depth, conv=conv, options=parsed(options))
        schedule = loop.Schedule(steps=steps, batch=batch, rate=rate, seed=seed)
        torch.manual_seed(seed)
        net = spec.build().to(torch_device(device))
        history = loop.fit(net, drill, schedule, progress=bar.at)
        checkpoint.save(net.cpu(), spec, drill, schedule, history, folder)
        page = curves.loss(history, f"{op} on {task}", folder / "loss.html")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    found = {"op": op, "task": task, "parameters": parameters, "accuracy": history.score, "loss": history.losses[-1]}
    if as_json:
        typer.echo(json.dumps({**found, "folder": str(folder)}))
    else:
        show(f"{op} on {task}: accuracy {history.score:.1%} on held-out data, {parameters:,} parameters")
        show(f"network  {folder}", f"loss     {page}")


def parsed(options: str | None) -> dict[str, Any]:
    """`window=32,form=exp` as `{"window": 32, "form": "exp"}`."""
    found: dict[str, Any] = {}
    for part in (options or "").split(","):
        name, equals, value = part.partition("=")
        if not part.strip():
            continue
        if not equals or not name.strip().isidentifier():
            raise OptionError(f"options={options!r} must be NAME=VALUE between commas; got {part!r}")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found
