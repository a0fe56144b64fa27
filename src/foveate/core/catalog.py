"""The catalogue of systems that work, read from `catalog.toml` without torch.

A row says where a system's object lives; `System.load()` imports it, and with it whatever it needs. Rows are checked
when they are read, so that a bad one fails in the first test that looks and not when a user picks it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from foveate.core.errors import CatalogError, unknown

CATALOG = Path(__file__).parent.parent / "catalog.toml"
CAPABILITIES = CATALOG.with_name("capabilities.json")

ROOMS = (
    "ops", "nn", "models", "host", "kv", "steer", "lens", "train", "tasks", "gaze", "studies", "labs", "bench", "dist",
)  # fmt: skip

_FORMS = {
    "key": re.compile(r"[a-z][a-z0-9_]*"),
    "title": re.compile(r"\S.*"),
    "arxiv": re.compile(r"|\d{4}\.\d{4,5}|[a-z\-]+(\.[A-Z]{2})?/\d{7}"),
    "object": re.compile(r"foveate(\.[a-z_][a-z0-9_]*)+:[A-Za-z_]\w*"),
    "test": re.compile(r"tests/[\w/]+\.py"),
}


#: The survey's four categories, each with what it tells apart.
CATEGORIES = {
    "sequences": ("self", "distinctive", "co-attention"),
    "levels": ("single", "multi"),
    "positions": ("soft", "hard", "local"),
    "representations": ("single", "multi-representational", "multi-dimensional"),
}

#: What else the catalogue can be grouped by: where a system lives, and what operators and layers say of themselves.
FACTS = ("room", "kind", "family", "state", "growth")


@dataclass(frozen=True)
class Taxonomy:
    """A place in An Attentive Survey of Attention Models (2019), arXiv 1904.02874; a category may hold several.

    sequences: queries and keys of the same sequence, of different ones, or both sequences attending to each other.
    levels: one level of abstraction, or attention over the outcomes of attention.
    positions: all of them, softly; some, chosen by the input; or a neighbourhood.
    representations: one of each token, several, or a weight for each of its features.
    """

    sequences: tuple[str, ...] = ("self",)
    levels: tuple[str, ...] = ("single",)
    positions: tuple[str, ...] = ("soft",)
    representations: tuple[str, ...] = ("single",)


@dataclass(frozen=True)
class System:
    """One row of the catalogue: a published system and where it lives here."""

    key: str
    title: str
    year: int
    arxiv: str
    room: str
    object: str
    test: str
    tags: tuple[str, ...]
    taxonomy: Taxonomy
    example: str = ""

    @property
    def url(self) -> str:
        """The paper's address on arXiv, or "" where it has none."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def load(self) -> Any:
        """The class or function itself. This is what imports torch."""
        module, _, name = self.object.partition(":")
        try:
            return getattr(import_module(module), name)
        except AttributeError:
            raise CatalogError(f'system "{self.key}": module {module} has no {name}') from None
        except ModuleNotFoundError as error:
            if not (f"{module}.").startswith(f"{error.name}."):
                raise  # our module is there; something it needs is not installed
            raise CatalogError(f'system "{self.key}": no module {error.name}') from None


def systems(room: str | None = None, tag: str | None = None) -> list[System]:
    """The catalogue's systems in its order, or only those of one room, or with one tag."""
    if room is not None and room not in ROOMS:
        raise unknown("room", room, ROOMS)
    return [row for row in read() if room in (None, row.room) and (tag is None or tag in row.tags)]


def grouped(rows: Sequence[System], by: str) -> dict[str, list[System]]:
    """The rows under each place that a category of the survey, or one of `FACTS`, tells apart.

    A row with several places stands under each; one of which a fact is not known stands under "none".
    """
    if by in CATEGORIES:
        return {place: [row for row in rows if place in getattr(row.taxonomy, by)] for place in CATEGORIES[by]}
    if by not in FACTS:
        raise unknown("category", by, (*CATEGORIES, *FACTS))
    known = {row.key: row.room if by == "room" else capabilities(row.key).get(by) or "none" for row in rows}
    return {place: [row for row in rows if known[row.key] == place] for place in dict.fromkeys(known.values())}


def capabilities(key: str) -> dict[str, Any]:
    """What an operator or a layer can do (`foveate.nn.capabilities.Capabilities`); {} for any other system."""
    return dict(_capabilities().get(key, {}))


@cache
def _capabilities() -> dict[str, Any]:
    try:
        found = json.loads(CAPABILITIES.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{CAPABILITIES}: {error}") from None
    return dict(found)


def system(key: str) -> System:
    """The system that `key` names."""
    by_key = {row.key: row for row in read()}
    if key not in by_key:
        raise unknown("system", key, by_key)
    return by_key[key]


@cache
def read(path: Path = CATALOG) -> tuple[System, ...]:
    """All rows of a catalogue file, checked; a malformed one raises `CatalogError` naming file, row and field."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from None
    rows = table.pop("system", [])
    if table or not isinstance(rows, list):
        raise CatalogError(f"{path}: expected only [[system]] tables, got {', '.join(table) or 'system'}")
    found = tuple(_system(row, f"{path.name}, row {number}") for number, row in enumerate(rows, start=1))
    _refuse_duplicates(found, path)
    return found


def _system(row: object, where: str) -> System:
    if not isinstance(row, dict):
        raise CatalogError(f"{where}: expected a [[system]] table, got {row!r}")
    if isinstance(row.get("key"), str):
        where += f' ("{row["key"]}")'
    known = [field.name for field in fields(System)]
    missing = [name for name in known if name not in row and name != "example"]
    if missing:
        raise CatalogError(f"{where}: missing {', '.join(missing)}")
    for name in row:
        if name not in known:
            raise CatalogError(f"{where}: {unknown('field', name, known)}")
        _check(name, row[name], where)
    _check_room(row, where)
    return System(**{**row, "tags": tuple(row["tags"]), "taxonomy": _taxonomy(row["taxonomy"], where)})


def _taxonomy(given: dict[str, Any], where: str) -> Taxonomy:
    where += ", taxonomy"
    if missing := [name for name in CATEGORIES if name not in given]:
        raise CatalogError(f"{where}: missing {', '.join(missing)}")
    places = {}
    for name, value in given.items():
        if name not in CATEGORIES:
            raise CatalogError(f"{where}: {unknown('category', name, CATEGORIES)}")
        chosen = value if isinstance(value, list) else [value]
        if not chosen or any(place not in CATEGORIES[name] for place in chosen):
            raise CatalogError(f"{where}: {name}={value!r} must be of {', '.join(CATEGORIES[name])}")
        places[name] = tuple(chosen)
    return Taxonomy(**places)


def _check(name: str, value: object, where: str) -> None:
    """Types first, then form."""
    if name == "tags":
        valid = isinstance(value, list) and all(isinstance(tag, str) and tag for tag in value)
        expected = "a list of non-empty strings"
    elif name == "taxonomy":
        valid, expected = isinstance(value, dict), f"a table of {', '.join(CATEGORIES)}"
    elif name == "year":
        valid, expected = type(value) is int and 1900 <= value <= 2100, "a year"
    else:
        valid, expected = isinstance(value, str), "a string"
    if valid and name in _FORMS:
        form = _FORMS[name]
        valid, expected = bool(form.fullmatch(str(value))), f"a string of the form {form.pattern}"
    if not valid:
        raise CatalogError(f"{where}: {name}={value!r} must be {expected}")


def _check_room(row: dict[str, Any], where: str) -> None:
    if row["room"] not in ROOMS:
        raise CatalogError(f"{where}: {unknown('room', row['room'], ROOMS)}")
    if not row["object"].startswith((f"foveate.{row['room']}.", f"foveate.{row['room']}:")):
        raise CatalogError(f'{where}: object="{row["object"]}" does not live in room "{row["room"]}"')


def _refuse_duplicates(rows: Sequence[System], path: Path) -> None:
    first: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if row.key in first:
            raise CatalogError(f'{path.name}: key "{row.key}" is in rows {first[row.key]} and {number}')
        first[row.key] = number
