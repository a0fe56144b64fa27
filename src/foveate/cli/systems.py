"""`foveate systems`: the catalogue, and one system's card, without importing torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.card import Card, read_card
from foveate.cli.console import show, width
from foveate.core import catalog
from foveate.core.errors import OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from foveate.cli.search import Match
    from foveate.core.catalog import System

Key = Annotated[str | None, typer.Argument(help="One system's key: show its card.")]
Room = Annotated[str | None, typer.Option(help="Only those of one room: ops, kv, steer, lens, ...")]
Tag = Annotated[str | None, typer.Option(help="Only those with this tag.")]
By = Annotated[
    str | None,
    typer.Option(
        help="Group by a category of the survey (sequences, levels, positions, representations) or by room, kind, "
        "family, state of a stream, or growth of time."
    ),
]
Search = Annotated[
    str | None,
    typer.Option(help='A need in plain words, such as "long context without retraining": what answers it, and why.'),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def command(
    key: Key = None, room: Room = None, tag: Tag = None, by: By = None, search: Search = None, as_json: Json = False
) -> None:
    """List the published systems that work here and what they can do, find some, or show one system's card."""
    if search is not None:
        if key is not None or by is not None:
            raise OptionError("--search takes --room, --tag and --json beside it, and neither a KEY nor --by")
        _show_matches(search, catalog.systems(room, tag), as_json)
        return
    if key is not None:
        _show_card(catalog.system(key), as_json)
        return
    rows = catalog.systems(room, tag)
    groups = {"": rows} if by is None else catalog.grouped(rows, by)
    if as_json:
        found = {name: [_fields(row) for row in group] for name, group in groups.items()}
        typer.echo(json.dumps(found[""] if by is None else found, indent=1))
        return
    for name, group in groups.items():
        if name:
            show(f"\n{by}: {name}")
        show(_table(group))
    count = f"{len(rows)} system{'' if len(rows) == 1 else 's'}; `foveate systems KEY` shows one"
    show(count, _LEGEND if width() >= _WIDE else f"{_WIDE} columns also show what they attend to and how they grow")


_WIDE = 100  # the fewest columns in which the facts leave room for titles
_LEGEND = (
    "attends: s self, c causal self, x cross, y causal cross; streams: state that stays constant or grows; "
    "time: in the number of tokens"
)
_LETTERS = {"self": "s", "causal self": "c", "cross": "x", "causal cross": "y"}


def _show_matches(need: str, rows: list[System], as_json: bool) -> None:
    from foveate.cli.search import search, understood, unknown_words

    if not need.strip():
        raise OptionError("--search must be a need in plain words")
    matches = search(need, rows)
    if as_json:
        found = [{**_fields(match.system), "score": match.score, "why": match.why} for match in matches]
        typer.echo(json.dumps(found, indent=1))
        return
    hints = [item.hint for item in understood(need)[0] if item.hint]
    if left_out := unknown_words(need):
        hints.insert(0, f"no system knows {', '.join(left_out)}")
    if not matches:
        show(f"nothing answers {need!r}; `foveate systems` lists everything", *hints)
        return
    show(_found(matches), f"{len(matches)} of {len(rows)} systems, best first; `foveate systems KEY` shows one", *hints)


def _found(matches: list[Match]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("room", no_wrap=True)
    table.add_column("why", ratio=3)
    table.add_column("title", ratio=2)
    for match in matches:
        row = match.system
        key = Text(row.key, style=f"bold link {row.url}" if row.url else "bold")
        table.add_row(key, row.room, Text("\n".join(match.why)), Text(f"{row.title} ({row.year})", style="dim"))
    return table


def _show_card(row: System, as_json: bool) -> None:
    card = read_card(row.object)
    if as_json:
        typer.echo(json.dumps({**_fields(row), **asdict(card)}, indent=1))
    else:
        show(*_card(row, card))


def _fields(row: System) -> dict[str, object]:
    return {**asdict(row), "url": row.url, "capabilities": catalog.capabilities(row.key)}


def _table(rows: list[System]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table, is_wide = Table(box=None, pad_edge=False), width() >= _WIDE
    for heading in ("key", "year", "room", *("attends", "streams", "time") * is_wide):
        table.add_column(heading, no_wrap=True)
    table.add_column("title", ratio=2)
    if is_wide:
        table.add_column("tags", ratio=1)
    for row in rows:
        key = Text(row.key, style=f"bold link {row.url}" if row.url else "bold")
        facts, tags = _facts(row.key) * is_wide, (Text(", ".join(row.tags), style="dim"),) * is_wide
        table.add_row(key, str(row.year), row.room, *facts, Text(row.title), *tags)
    return table


def _facts(key: str) -> tuple[str, str, str]:
    """Abbreviate a system's attention patterns, the state of its stream, and the growth of its time."""
    facts = catalog.capabilities(key)
    if not facts:
        return "", "", ""
    attends = "".join(letter for pattern, letter in _LETTERS.items() if pattern in facts["patterns"])
    return attends, facts["state"] or "no", facts["growth"]


def _fact_text(value: object) -> str:
    """Format a capability for the card; None gives an empty text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, dict):
        return "; ".join(f"{name} {_fact_text(fact)}" for name, fact in value.items())
    return "" if value is None else str(value)


def _card(row: System, card: Card) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    named = {"paper": row.url, "room": row.room, "object": row.object, "tags": ", ".join(row.tags), "test": row.test}
    named |= {name.replace("_", " "): _fact_text(value) for name, value in catalog.capabilities(row.key).items()}
    named |= {name: ", ".join(places) for name, places in asdict(row.taxonomy).items()}
    for name, value in named.items():
        if value:
            facts.add_row(Text(name, style="dim"), Text(value))
    parts: list[RenderableType] = [Text.assemble((row.key, "bold"), f"  {row.title} ({row.year})"), facts]
    if card.doc:
        parts += ["", Text(card.doc)]
    if card.options:
        parts += ["", Text("options", style="dim")]
        parts += [Text(f"  {option}") for option in card.options]
    if row.example:
        parts += ["", Text("example", style="dim")]
        parts += [Text(f"  {line}") for line in row.example.strip().splitlines()]
    return parts
