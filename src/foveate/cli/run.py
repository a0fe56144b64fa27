"""`foveate run`: generate with a recipe, or with methods at a budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.compare import Model, Trust, _keys
from foveate.cli.console import Bar
from foveate.cli.options import Config, Device, Dtype, Json
from foveate.core.errors import OptionError

Prompt = Annotated[str, typer.Argument(help="The prompt, or the question about --file.")]
Recipe = Annotated[
    str | None, typer.Option(help="Recipe of `foveate tune`, `foveate compare` or `foveate.save`. Default: full cache.")
]
Methods = Annotated[
    str | None, typer.Option(help="Keys of `foveate systems`, separated by commas, instead of a recipe.")
]
Budget = Annotated[float, typer.Option(help="Share of the full cache that each of --methods may use, in (0, 1].")]
File = Annotated[Path | None, typer.Option(help="A long text (UTF-8), which is put before the prompt.")]
Before = Annotated[
    bool,
    typer.Option(
        "--before-question", help="Compress --file before the prompt is read, so that methods do not know the question."
    ),
]
Tokens = Annotated[int, typer.Option(help="The most tokens of the answer.")]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Use the model's chat template, or not. Default: if it has one."),
]
System = Annotated[str | None, typer.Option(help="A system message for the chat template.")]
Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens by the model's own settings.")]
Seed = Annotated[int, typer.Option(help="Seed of --sample.")]


def command(
    prompt: Prompt,
    model: Model = None,
    recipe: Recipe = None,
    methods: Methods = None,
    budget: Budget = 0.35,
    file: File = None,
    before_question: Before = False,
    tokens: Tokens = 256,
    chat: Chat = None,
    system: System = None,
    sample: Sample = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Generate an answer with a recipe, or with methods at a budget.

    The answer is printed as it is generated. The bytes of the cache
    and the tokens per second follow on stderr.
    """
    keys, text = _keys(methods), None if file is None else _read(file)
    with Bar("loading") as bar:
        from foveate.bench import chosen_methods
        from foveate.bench.generation import Asked, generate, ids_of
        from foveate.bench.loading import load
        from foveate.bench.parts.plaindata import plain

        chosen_methods.check(recipe, keys, budget)
        asked = Asked(prompt, text, chat, system, before_question)
        loaded, tokenizer, folder = load(model, device, dtype, trust_remote_code=trust_remote_code, note=bar.say)
        from foveate.host.hf.model import host

        length = len(ids_of(asked, tokenizer))
        chosen = chosen_methods.chosen(recipe, keys, budget, host(loaded), tokenizer, length, folder, bar.say)
    import torch

    torch.manual_seed(seed)
    found = generate(
        loaded, tokenizer, chosen, asked, tokens=tokens, sample=sample, write=_silent if as_json else _write
    )
    if as_json:
        typer.echo(json.dumps(plain(found)))
        return
    typer.echo()
    typer.echo(found.line(), err=True)


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """Print nothing."""


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except OSError as error:
        raise OptionError(f"file={file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise OptionError(f"file={file} is not UTF-8 text") from None
