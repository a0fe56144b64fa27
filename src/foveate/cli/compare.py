"""`foveate compare`: one model, one task, several methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.bench import known
from foveate.cli.console import Bar, explained, show, what_is_kept
from foveate.cli.options import Config, Device, Dtype, Fresh, Json
from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS, SCORES
from foveate.tasks.registry import TASKS

if TYPE_CHECKING:
    from foveate.bench.comparison.results import Comparison

Model = Annotated[
    str | None,
    typer.Option(
        help="Folder, GGUF file, adapter folder or hub id of a Hugging Face decoder. Default: the included lab model."
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help=f"{', '.join([*TASKS, 'mqar', 'copy'])}; or a file of prompts and answers: .jsonl, .json, .csv, .tsv, "
        ".parquet or a dataset's folder. Default: needle, or the task that the model was trained on.",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Keys and recipes (FILE.json, with its own budget), separated by commas. "
        f"Policies: {', '.join(known.policies())}. "
        f"Operators that read the prompt: {', '.join(known.readers())}. The full cache always runs; "
        f"{known.PACKED} keeps it and decodes faster. Default: {', '.join(known.DEFAULT[1:])}."
    ),
]
Budget = Annotated[float, typer.Option(help="Share of each prompt's full cache that a method may use, in (0, 1].")]
Budgets = Annotated[
    str | None, typer.Option(help="Several such shares, with commas, in place of --budget: 0.1,0.25,0.5.")
]
Examples = Annotated[int | None, typer.Option(help="Number of prompts. Default: the task's own.")]
Length = Annotated[
    int | None,
    typer.Option(help="Length of the prompts, for tasks that generate them: characters, or tokens from ruler/ on."),
]
Score = Annotated[
    str | None, typer.Option(help=f"How answers are scored: {', '.join([*SCORES, LOSS])}. Default: the task's own.")
]
Batch = Annotated[int, typer.Option(help="Number of prompts of similar length that run together, padded on the left.")]
Out = Annotated[Path, typer.Option(help="Folder for report.html, results.json and the answers found so far.")]
Seed = Annotated[int, typer.Option(help="Seed of the task.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code from the model's folder or repository run. Read it first.")
]
PromptField = Annotated[
    str | None, typer.Option(help="Field of --task's prompts: NAME, NAME.NAME, or a template with {NAME}.")
]
AnswerField = Annotated[str | None, typer.Option(help="Field of --task's answers, or of lists of accepted ones.")]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to plain prompts too.")]
NewTokens = Annotated[int | None, typer.Option(help="Number of tokens to generate. Default: by the answers.")]
Query = Annotated[
    str,
    typer.Option(
        help="both: where prompts divide into context and question, also measure methods that compress the context "
        "without knowing the question; aware: leave that out."
    ),
]
Turns = Annotated[
    str | None,
    typer.Option(help="Rows with several questions on one context (SCBench): multi-turn (default) or multi-request."),
]
Renumber = Annotated[
    bool,
    typer.Option(
        "--renumber",
        help="Under policies that evict, count only kept tokens in positions: for prompts past the model's context.",
    ),
]

Lost = Annotated[
    bool,
    typer.Option(
        "--lost",
        help="Read the examples that a method breaks once more: where did the full cache look, and was that dropped?",
    ),
]

Export = Annotated[
    Path | None, typer.Option(help="Also write every answer's score and costs to this .csv or .parquet file.")
]
History = Annotated[
    Path | None,
    typer.Option(help="Run nothing; write one page of all runs in this folder and the folders below it."),
]


def command(
    model: Model = None,
    task: TaskName = None,
    methods: Methods = None,
    budget: Budget = 0.35,
    budgets: Budgets = None,
    examples: Examples = None,
    length: Length = None,
    score: Score = None,
    batch: Batch = 1,
    out: Out = Path("foveate-compare"),
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    chat: Chat = False,
    new_tokens: NewTokens = None,
    renumber: Renumber = False,
    look_up: Lost = False,
    export: Export = None,
    history: History = None,
    query: Query = "both",
    turns: Turns = None,
    config: Config = None,
    as_json: Json = False,
    fresh: Fresh = False,
) -> None:
    """Run a model on a task under several methods, and compare score, cache, time and memory with the full cache.

    Without options the lab model retrieves needles from real text.
    That takes about a minute. Each prompt's answers are saved at once,
    and the same command resumes after an interruption.
    A method that fails gets a row with the reason.
    """
    if history is not None:
        _show_history(history, {"model": model, "task": task, "methods": methods, "budgets": budgets, "export": export})
        return
    keys, shares = _keys(methods), _shares(budgets)
    if export is not None:
        _check_export(export)
    with explained(lambda interrupt: what_is_kept(interrupt, "answers", out)), Bar("loading") as bar:
        from foveate.bench.comparison.run import compare

        found = compare(
            model=model, task=task, methods=keys, budget=budget, budgets=shares, examples=examples, length=length,
            score=score, batch=batch, out=out, seed=seed, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code, prompt_field=prompt_field, answer_field=answer_field, chat=chat,
            new_tokens=new_tokens, renumber=renumber, lost=look_up, query=query, turns=turns, fresh=fresh,
            progress=bar,
        )  # fmt: skip
    _write(found, out, export, as_json)


def _write(found: Comparison, out: Path, export: Path | None, as_json: bool) -> None:
    """Write the page and the exported answers, and print the results."""
    from foveate.report import headline, html, lost, significance, table

    page = html.write(found, out / "report.html")
    if export is not None:
        _export(found, export)
    if as_json:
        typer.echo(found.to_json(), nl=False)
        return
    show(table.render(found), *headline.notes(found))
    if said := significance.statements(found):
        show("", *said)
    if lost.losses(found):
        show("", lost.table(found))
    show("", f"report   {page}", f"results  {out / 'results.json'}")
    if export is not None:
        show(f"answers  {export}")


def _check_export(path: Path) -> None:
    from foveate.bench.comparison.export import check

    check(path)


def _export(found: Comparison, path: Path) -> None:
    from foveate.bench.comparison.export import export

    export(found, path)


def _show_history(folder: Path, others: dict[str, object]) -> None:
    """Write the page of a folder's runs; options of a run do not go with it."""
    from foveate.bench.comparison.history import runs
    from foveate.report import history

    given = [name for name, value in others.items() if value is not None]
    if given:
        raise OptionError(f"--history runs nothing, so it does not go with --{given[0]}")
    found = runs(folder)
    page = history.write(found, folder, folder / "history.html")
    show(history.table(found, folder), "", f"page     {page}")


def _keys(methods: str | None) -> list[str] | None:
    if methods is None:
        return None
    keys = [key.strip() for key in methods.split(",") if key.strip()]
    if not keys:
        raise OptionError(f'methods="{methods}" must name keys of `foveate systems`, separated by commas')
    return keys


def _shares(budgets: str | None) -> list[float] | None:
    try:
        return None if budgets is None else [float(word) for word in budgets.split(",") if word.strip()]
    except ValueError:
        raise OptionError(f"budgets={budgets!r} must be numbers, separated by commas") from None
