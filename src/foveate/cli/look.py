"""`foveate look`: a text, or the texts of a file, under a lens, as tables and a page of all heads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.compare import Model, Trust
from foveate.cli.console import Bar, show
from foveate.cli.options import Config, Device, Dtype, Fresh, Json
from foveate.cli.run import _read
from foveate.core.errors import Interrupted, OptionError

if TYPE_CHECKING:
    from foveate.bench.looking import Looked

    #: What was found, the paths of JSON and table, and that of the page.
    Written = tuple[Looked, tuple[Path, Path], Path]

Source = Annotated[str | None, typer.Argument(metavar="TEXT|FILE", help="A text, or a file of it (UTF-8).")]
Measures = Annotated[
    str,
    typer.Option(
        "--measure",
        help="Measures, separated by commas: entropy, sink_mass, received_mass, received_mean, mean_distance, "
        "own_token, previous_token, within_4, windowed_distance, future_influence, duplicate_token, induction, "
        "copying, output_norm, next_logit.",
    ),
]
Heads = Annotated[str | None, typer.Option(help="Heads whose maps the page shows, as layer.head with commas: 3.1,5.7.")]
Spans = Annotated[
    str | None,
    typer.Option(help="Spans of tokens, as name=start:stop with commas; adds the mass between each two of them."),
]
Generate = Annotated[int, typer.Option(help="The most tokens to generate after the text, greedily.")]
Roles = Annotated[
    bool, typer.Option("--roles", help="Name the heads that have a role: induction, sink, local, and so on.")
]
Views = Annotated[
    bool,
    typer.Option("--views", help="Also write view.html, the lines, maps and neurons of all heads, and joint.html."),
]
DataFile = Annotated[
    str | None,
    typer.Option("--data", help="A file of texts instead of one: JSON lines, JSON, CSV, Parquet, a dataset's folder."),
]
Field = Annotated[
    str | None,
    typer.Option(help="Field of --data that holds the text, or a template. Default: text, content, document, prompt."),
]
Texts = Annotated[int | None, typer.Option(help="The most rows of --data to read.")]
Batch = Annotated[int, typer.Option(help="Texts of --data that the model reads together.")]
Length = Annotated[
    int | None, typer.Option(help="The most tokens of a text of --data. Default: what the model's context holds.")
]
Out = Annotated[Path, typer.Option(help="Folder for look.html, look.json and look.parquet (or look.csv).")]


def command(
    text: Source = None,
    model: Model = None,
    measure: Measures = "entropy,sink_mass,received_mass",
    heads: Heads = None,
    spans: Spans = None,
    generate: Generate = 0,
    roles: Roles = False,
    views: Views = False,
    data: DataFile = None,
    field: Field = None,
    texts: Texts = None,
    batch: Batch = 4,
    length: Length = None,
    out: Out = Path("foveate-look"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    config: Config = None,
    as_json: Json = False,
    fresh: Fresh = False,
) -> None:
    """Measure all attention heads of a model while it reads a text, or the texts of a file.

    The model runs once, with its own fast kernel. The page colours
    all heads and each head's tokens by any of the measures, and works offline.
    With --data the numbers are means over texts, and the same command
    resumes after an interruption.
    """
    common: dict[str, Any] = {
        "model": model, "measures": _names(measure), "heads": _heads(heads), "device": device, "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if data is not None:
        _refuse_beside_data(TEXT=text, spans=spans, generate=generate, roles=roles, views=views)
        found, paths, page = _data(
            dict(file=data, field=field, texts=texts, batch=batch, length=length), common, out, fresh
        )
    elif text is None:
        raise OptionError("give a text, a file of one, or --data with a file of texts")
    else:
        own = {"text": _text(text), "generate": generate, "with_roles": roles, "with_views": views}
        found, paths, page = _one(_spans(spans), {**common, **own}, out)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        from foveate.report import look as report

        results, table = paths
        more = [f"view     {each}" for each in found.views.paths(out)] if found.views is not None else []
        show(*report.lines(found), "", f"page     {page}", *more, f"results  {results}", f"table    {table}")


def _one(spans: dict[str, tuple[int, int]], options: dict[str, Any], out: Path) -> Written:
    """Look at one text, and write the results."""
    with Bar("loading") as bar:
        from foveate.bench.looking import look_at
        from foveate.bench.parts.folder import lock_folder
        from foveate.lens.span_measures import span_masses
        from foveate.report import look as report

        if spans:
            options["measures"] = [*options["measures"], *span_masses(spans)]
        with lock_folder(out):
            found = look_at(**options, progress=bar.at, say=bar.say)
            if found.views is not None:
                found.views.save(out)
            return found, found.save(out), report.write(found, out / "look.html")


def _data(data: dict[str, Any], options: dict[str, Any], out: Path, fresh: bool) -> Written:
    """Look at the texts of a file, and write the results."""
    try:
        with Bar("loading") as bar:
            from foveate.bench.looking import Data, finish, look_at_data
            from foveate.bench.parts.folder import lock_folder
            from foveate.report import look as report

            source = Data(**data)
            with lock_folder(out):
                found = look_at_data(data=source, folder=out, fresh=fresh, progress=bar.at, say=bar.say, **options)
                page = report.write(found, out / "look.html")
                return found, finish(found, out), page
    except Interrupted as stopped:
        kept = f"{stopped.done:,} of {stopped.total:,} texts are measured and kept in {out}; run the same "
        kept += "command to resume"
        typer.echo(f"interrupted: {kept}" if stopped.done else "interrupted before any text was measured", err=True)
        raise typer.Exit(1) from None


def _refuse_beside_data(**given: object) -> None:
    for name, value in given.items():
        if value:
            shown = name if name.isupper() else f"--{name}"
            raise OptionError(f"{shown} goes with one text, and --data with a file of them; leave one of the two out")


def _text(source: str) -> str:
    """Return the text of a file, or else the source itself; a word that looks like a file's name has to be one."""
    if not source.strip():
        raise OptionError("text must not be empty")
    try:
        is_folder, is_file = Path(source).is_dir(), Path(source).is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or has a NUL
        return source
    if is_folder:
        raise OptionError(f"text={source!r} is a folder; give a file or a text")
    if not is_file and re.fullmatch(r"\S+\.[A-Za-z]\w{0,4}", source):
        raise OptionError(f"text={source!r} looks like a file, but there is none; a text has spaces")
    return _read(Path(source)) if is_file else source


def _names(measures: str) -> list[str]:
    names = [name.strip() for name in measures.split(",") if name.strip()]
    if not names:
        raise OptionError(f'measure="{measures}" must name measures, separated by commas: entropy,sink_mass')
    return list(dict.fromkeys(names))


def _heads(heads: str | None) -> list[tuple[int, int]]:
    found: dict[tuple[int, int], None] = {}  # a head that is named twice has one map
    for word in (heads or "").split(","):
        match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", word.strip(), re.ASCII)
        if match is not None:
            found[int(match[1]), int(match[2])] = None
        elif word.strip():
            raise OptionError(f"heads={heads!r} must be layer.head with commas, such as 3.1,5.7")
    return list(found)


def _spans(spans: str | None) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for word in (spans or "").split(","):
        match = re.fullmatch(r"([^=]+)=(\d{1,9}):(\d{1,9})", word.strip(), re.ASCII)
        if match is not None and match[1].strip() not in found:
            found[match[1].strip()] = (int(match[2]), int(match[3]))
        elif word.strip():
            raise OptionError(
                f"spans={spans!r} must be name=start:stop with commas, each name once: question=3:9,context=9:200"
            )
    return found
