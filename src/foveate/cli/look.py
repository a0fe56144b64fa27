"""`foveate look`: one text under a lens, as tables and a page of all heads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.compare import Model, Trust
from foveate.cli.console import Bar, show
from foveate.cli.options import Config, Device, Dtype, Json
from foveate.cli.run import _read
from foveate.core.errors import OptionError

Source = Annotated[str, typer.Argument(metavar="TEXT|FILE", help="A text, or a file of it (UTF-8).")]
Measures = Annotated[
    str,
    typer.Option(
        "--measure",
        help="Measures, separated by commas: entropy, sink_mass, received_mass, received_mean, mean_distance, "
        "own_token, previous_token, within_4.",
    ),
]
Heads = Annotated[str | None, typer.Option(help="Heads whose maps the page shows, as layer.head with commas: 3.1,5.7.")]
Generate = Annotated[int, typer.Option(help="The most tokens to generate after the text, greedily.")]
Roles = Annotated[
    bool, typer.Option("--roles", help="Name the heads that have a role: induction, sink, local, and so on.")
]
Views = Annotated[
    bool,
    typer.Option("--views", help="Also write view.html, the lines, maps and neurons of all heads, and joint.html."),
]
Out = Annotated[Path, typer.Option(help="Folder for look.html, look.json and look.parquet (or look.csv).")]


def command(
    text: Source,
    model: Model = None,
    measure: Measures = "entropy,sink_mass,received_mass",
    heads: Heads = None,
    generate: Generate = 0,
    roles: Roles = False,
    views: Views = False,
    out: Out = Path("foveate-look"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure all attention heads of a model while it reads a text.

    The model runs once, with its own fast kernel. The page colours
    all heads and each head's tokens by any of the measures, and works offline.
    """
    content, names, chosen = _text(text), _names(measure), _heads(heads)
    with Bar("loading") as bar:
        from foveate.bench.looking import look_at
        from foveate.bench.parts.folder import lock_folder
        from foveate.report import look as report

        with lock_folder(out):
            found = look_at(
                model, content, measures=names, heads=chosen, generate=generate, with_roles=roles, with_views=views,
                device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=bar.at, say=bar.say,
            )  # fmt: skip
            data, table = found.save(out)
            page = report.write(found, out / "look.html")
            more = [] if found.views is None else [f"view     {each}" for each in found.views.save(out)]
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        show(*report.lines(found), "", f"page     {page}", *more, f"results  {data}", f"table    {table}")


def _text(source: str) -> str:
    """Return the text of a file, or else the source itself; a word that looks like a file's name has to be one."""
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
