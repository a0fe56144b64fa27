"""The catalogue of systems that work, read from `catalog/<room>.toml` without torch.

A row says where a system's object and its parts live; `System.load()` imports the object, and with it whatever it
needs. A room's file is read when it is first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from foveate.core.catalog_file import read
from foveate.core.catalog_rows import CATEGORIES, ROOMS, Shelf, System, Taxonomy
from foveate.core.errors import CatalogError, unknown

__all__ = [
    "CATEGORIES", "FACTS", "ROOMS", "System", "Taxonomy", "capabilities", "grouped", "module_of", "public_names",
    "shelf", "system", "systems",
]  # fmt: skip

FOLDER = Path(__file__).parent.parent / "catalog"
CAPABILITIES = FOLDER / "capabilities.json"

#: What else the catalogue can be grouped by: where a system lives, and what operators and layers say of themselves.
FACTS = ("room", "kind", "family", "state", "growth")


def systems(room: str | None = None, tag: str | None = None) -> list[System]:
    """The catalogue's systems in its order, or only those of one room, or with one tag."""
    if room is not None and room not in ROOMS:
        raise unknown("room", room, ROOMS)
    rows = _by_key().values() if room is None else shelf(room).systems
    return [row for row in rows if tag is None or tag in row.tags]


def system(key: str) -> System:
    """The system that `key` names."""
    try:
        return _by_key()[key]
    except KeyError:
        raise unknown("system", key, _by_key()) from None


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
    """What an operator or a layer can do (`foveate.bench.Capabilities`); {} for any other system."""
    return dict(_capabilities().get(key, {}))


def public_names(package: str) -> dict[str, str]:
    """The public names of a room ("nn") or of a package in it ("ops.functional"), each with its module."""
    names = dict(shelf(package.partition(".")[0]).public)
    for row in _by_key().values():
        for target in (row.object, *row.parts):
            module, _, name = target.partition(":")
            names[name] = module if _package(module) == package else names.get(name, module)
    return {name: module for name, module in sorted(names.items()) if _package(module) == package}


def module_of(package: str, name: str) -> str | None:
    """The module that defines a package's public name; None where it has no such name.

    The room's own file is looked at first, so that the others are read only where a system's part lives elsewhere.
    """
    for target, module in _named(shelf(package.partition(".")[0])):
        if target == name and _package(module) == package:
            return module
    return public_names(package).get(name)


def _named(found: Shelf) -> Iterator[tuple[str, str]]:
    yield from found.public.items()
    for row in found.systems:
        for target in (row.object, *row.parts):
            module, _, name = target.partition(":")
            yield name, module


def _package(module: str) -> str:
    """The package that publishes a module's names."""
    _, room, *rest = module.split(".")
    return "ops.functional" if room == "ops" and rest[:1] == ["functional"] else room


@cache
def shelf(room: str) -> Shelf:
    """What the catalogue's file of a room says, checked; a malformed one raises `CatalogError`."""
    path = FOLDER / f"{room}.toml"
    return read(path) if path.is_file() else Shelf()


@cache
def _by_key() -> dict[str, System]:
    found: dict[str, System] = {}
    for room in ROOMS:
        for row in shelf(room).systems:
            if row.key in found:
                raise CatalogError(f'key "{row.key}" is in {found[row.key].room}.toml and in {room}.toml')
            found[row.key] = row
    return found


@cache
def _capabilities() -> dict[str, Any]:
    try:
        found = json.loads(CAPABILITIES.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{CAPABILITIES}: {error}") from None
    return dict(found)
