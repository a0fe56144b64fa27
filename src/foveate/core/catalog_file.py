"""Read and check one room's file of the catalogue, so that a bad row fails in the first test that reads it.

Errors name file, row and field.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from foveate.core.catalog_rows import CATEGORIES, ROOMS, Shelf, System, Taxonomy
from foveate.core.errors import CatalogError, unknown

_TARGET = r"foveate(\.[a-z_][a-z0-9_]*)+:[A-Za-z_]\w*"
_FORMS = {
    "key": re.compile(r"[a-z][a-z0-9_]*"),
    "title": re.compile(r"\S.*"),
    "arxiv": re.compile(r"|\d{4}\.\d{4,5}|[a-z\-]+(\.[A-Z]{2})?/\d{7}"),
    "object": re.compile(_TARGET),
    "test": re.compile(r"tests/[\w/]+\.py"),
}
_LISTS = ("authors", "tags", "parts")


def read(path: Path) -> Shelf:
    """Read the rows and public names of a file. The file is named after its room."""
    room = path.stem
    if room not in ROOMS:
        raise CatalogError(f"{path.name}: {unknown('room', room, ROOMS)}")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from None
    rows, public = table.pop("system", []), table.pop("public", {})
    if table or not isinstance(rows, list):
        raise CatalogError(f"{path}: expected only [public] and [[system]] tables, got {', '.join(table) or 'system'}")
    found = tuple(_system(row, room, f"{path.name}, row {number}") for number, row in enumerate(rows, start=1))
    _refuse_duplicates(found, path)
    return Shelf(found, _public(public, room, path))


def _public(given: object, room: str, path: Path) -> dict[str, str]:
    """Invert a table from module to names into one from name to module."""
    names: dict[str, str] = {}
    for module, listed in given.items() if isinstance(given, dict) else ():
        if not _lives_in(module, room) or not _is_strings(listed):
            raise CatalogError(f"{path.name}, public: {module!r} must be a module of {room} with a list of its names")
        for name in listed:
            if name in names and ("functional" in module) == ("functional" in names[name]):
                raise CatalogError(f"{path.name}, public: {name} is in {names[name]} and in {module}")
            names[name] = module
    return names


def _system(row: object, room: str, where: str) -> System:
    if not isinstance(row, dict):
        raise CatalogError(f"{where}: expected a [[system]] table, got {row!r}")
    if isinstance(row.get("key"), str):
        where += f' ("{row["key"]}")'
    known = {field.name: field.default is not MISSING for field in fields(System) if field.name != "room"}
    if missing := [name for name, is_optional in known.items() if name not in row and not is_optional]:
        raise CatalogError(f"{where}: missing {', '.join(missing)}")
    for name in row:
        if name not in known:
            raise CatalogError(f"{where}: {unknown('field', name, known)}")
        _check(name, row[name], where)
    if not _lives_in(row["object"].partition(":")[0], room):
        raise CatalogError(f'{where}: object="{row["object"]}" does not live in room "{room}"')
    lists = {name: tuple(row[name]) for name in _LISTS if name in row}
    return System(**{**row, **lists, "room": room, "taxonomy": _taxonomy(row["taxonomy"], where)})


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
    """Check a field's type, then its form."""
    if name in _LISTS:
        valid, expected = _is_strings(value), "a list of non-empty strings"
    elif name == "taxonomy":
        valid, expected = isinstance(value, dict), f"a table of {', '.join(CATEGORIES)}"
    elif name == "year":
        valid, expected = type(value) is int and 1900 <= value <= 2100, "a year"
    else:
        valid, expected = isinstance(value, str), "a string"
    if valid and name in _FORMS:
        form = _FORMS[name]
        valid, expected = bool(form.fullmatch(str(value))), f"a string of the form {form.pattern}"
    if valid and name == "parts" and isinstance(value, list):
        valid, expected = all(re.fullmatch(_TARGET, part) for part in value), f"strings of the form {_TARGET}"
    if not valid:
        raise CatalogError(f"{where}: {name}={value!r} must be {expected}")


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _lives_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"foveate.{room}.")


def _refuse_duplicates(rows: Sequence[System], path: Path) -> None:
    first: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if row.key in first:
            raise CatalogError(f'{path.name}: key "{row.key}" is in rows {first[row.key]} and {number}')
        first[row.key] = number
