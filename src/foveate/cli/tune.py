"""`foveate tune`: the cheapest setting that keeps a share of the full cache's score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.compare import AnswerField, Chat, Model, NewTokens, PromptField, Score, TaskName, Trust, _keys
from foveate.cli.console import Bar, explained, show, what_is_kept
from foveate.cli.options import Config, Device, Dtype, Fresh, Json
from foveate.core.errors import OptionError

Keep = Annotated[float, typer.Option(help="Share of the full cache's score to keep, under 1.")]
Methods = Annotated[
    str | None,
    typer.Option(help="Keys of policies that evict, separated by commas. Default: all that need not learn first."),
]
Budgets = Annotated[
    str | None, typer.Option(help="Shares of the full cache to try, separated by commas. Default: nine of 0.03 to 0.7.")
]
Search = Annotated[int, typer.Option(help="Number of examples to search with.")]
HeldOut = Annotated[
    int | None,
    typer.Option(help="Number of further examples to test with. Default: as many as can show the allowed loss."),
]
Level = Annotated[float, typer.Option(help="Confidence of what is claimed, at least 0.5.")]
Length = Annotated[int | None, typer.Option(help="Length of the prompts, for tasks that generate them.")]
Out = Annotated[Path, typer.Option(help="Folder for recipe.json, tuning.json and the answers found so far.")]
Seed = Annotated[int, typer.Option(help="Seed of the task, and of the split of a file.")]


def command(
    model: Model = None,
    task: TaskName = None,
    keep: Keep = 0.98,
    methods: Methods = None,
    budgets: Budgets = None,
    search: Search = 16,
    held_out: HeldOut = None,
    level: Level = 0.95,
    length: Length = None,
    score: Score = None,
    out: Out = Path("foveate-tune"),
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    chat: Chat = False,
    new_tokens: NewTokens = None,
    config: Config = None,
    as_json: Json = False,
    fresh: Fresh = False,
) -> None:
    """Find the setting with the fewest bytes of cache that keeps a share of the full cache's score.

    Policies, budgets and options are searched, then a budget for each layer.
    The result is tested on examples that the search has not seen, and saved
    as a recipe for `foveate run` and `foveate compare`. Each answer is saved
    at once, and the same command resumes after an interruption.
    """
    keys, shares = _keys(methods), _numbers(budgets)
    with explained(lambda interrupt: what_is_kept(interrupt, "answers", out, of_all=False)), Bar("loading") as bar:
        from foveate.bench.tuning.run import tune
        from foveate.bench.tuning.space import BUDGETS

        found = tune(
            model=model, task=task, keep=keep, methods=keys, budgets=shares or BUDGETS, search=search,
            held_out=held_out, level=level, length=length, score=score, out=out, seed=seed, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code, prompt_field=prompt_field, answer_field=answer_field, chat=chat,
            new_tokens=new_tokens, fresh=fresh, progress=bar,
        )  # fmt: skip
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    files = f"recipe   {found.recipe}", f"tried    {out / 'tuning.json'}"
    show(found.table(), "", found.claim(), *found.notes, "", *files)


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise OptionError(f"budgets={text!r} must be numbers, separated by commas") from None
