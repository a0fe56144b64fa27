"""`foveate tune`: the cheapest setting that keeps a share of the full cache's score."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.compare import AnswerField, Chat, Model, NewTokens, PromptField, Score, TaskName, Trust, _keys
from foveate.cli.console import Bar, explained, show, what_is_kept
from foveate.cli.options import Config, Device, Dtype, Fresh, Json
from foveate.core.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from foveate.bench.tuning.results import Tuning

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

_SHOWN = 12  # rows of the table


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
    show(_table(found), "", found.claim(), *found.notes, "", *files)


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise OptionError(f"budgets={text!r} must be numbers, separated by commas") from None


def _table(found: Tuning) -> Table:
    """Return a short table: what was tested on held-out examples, and of the search the cheapest settings that held.

    If none held, it has those of the search that lost least.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("setting", overflow="fold")
    for heading in ("bytes", "lost", "examples"):
        table.add_column(heading, justify="right")
    table.add_column("")
    searched = [one for one in found.tried if not one.held_out]
    held = sorted((one for one in searched if one.verdict == "holds"), key=lambda one: one.share)
    tested = [one for one in found.tried if one.held_out]
    # Where nothing held there is nothing else to show, and the reader has to know by how much each one missed.
    shown = held or sorted((one for one in searched if not isnan(one.lost)), key=lambda one: one.lost)
    for one in [*shown[: max(1, _SHOWN - len(tested))][::-1], *tested]:
        numbers = "-" if isnan(one.share) else f"{one.share:.1%}", "-" if isnan(one.lost) else f"{one.lost:.4f}"
        verdict = f"{one.verdict} (held out)" if one.held_out else one.verdict
        table.add_row(Text(one.setting), *numbers, str(one.examples), verdict)
    tries = "1 setting was tried" if len(found.tried) == 1 else f"{len(found.tried)} settings were tried"
    table.caption = f"{tries}; `lost` is the loss of score, a mean over examples."
    table.caption_justify = "left"
    return table
