"""The catalogue of published systems, read from `catalog/<room>.toml` without torch.

A row names the modules of a system's object and parts. `System.load()` imports the object and whatever it needs. A
room's file is read on first use.
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

#: Further keys to group the catalogue by: a system's room, and the capabilities of operators and layers.
FACTS = ("room", "kind", "family", "state", "growth")


def systems(room: str | None = None, tag: str | None = None) -> list[System]:
    """Return the catalogue's systems in its order, or only those of one room, or with one tag."""
    if room is not None and room not in ROOMS:
        raise unknown("room", room, ROOMS)
    tags = {one for row in _by_key().values() for one in row.tags}
    if tag is not None and tag not in tags:
        raise unknown("tag", tag, sorted(tags))
    rows = _by_key().values() if room is None else shelf(room).systems
    return [row for row in rows if tag is None or tag in row.tags]


def cache_policies() -> list[System]:
    """Return the systems of the room `kv` that are policies: all but those that convert a model."""
    return [row for row in systems(room="kv") if "conversion" not in row.tags]


def system(key: str) -> System:
    """Return the system that `key` names."""
    try:
        return _by_key()[key]
    except KeyError:
        raise unknown("system", key, _by_key()) from None


def grouped(rows: Sequence[System], by: str) -> dict[str, list[System]]:
    """Group the rows by the values of a category of the survey, or of one of `FACTS`.

    A row with several values is in each of their groups. A row with no known value is in the group "none".
    """
    if by in CATEGORIES:
        return {place: [row for row in rows if place in getattr(row.taxonomy, by)] for place in CATEGORIES[by]}
    if by not in FACTS:
        raise unknown("category", by, (*CATEGORIES, *FACTS))
    known = {row.key: row.room if by == "room" else capabilities(row.key).get(by) or "none" for row in rows}
    return {place: [row for row in rows if known[row.key] == place] for place in dict.fromkeys(known.values())}


def capabilities(key: str) -> dict[str, Any]:
    """Return the capabilities of an operator or a layer (`foveate.bench.Capabilities`); {} for any other system."""
    return dict(_capabilities().get(key, {}))


def public_names(package: str) -> dict[str, str]:
    """Return the public names of a room ("nn") or of a package in it ("ops.functional"), each with its module."""
    names = dict(shelf(package.partition(".")[0]).public)
    for row in _by_key().values():
        for target in (row.object, *row.parts):
            module, _, name = target.partition(":")
            names[name] = module if _package(module) == package else names.get(name, module)
    return {name: module for name, module in sorted(names.items()) if _package(module) == package}


def module_of(package: str, name: str) -> str | None:
    """Return the module that defines a package's public name, or None if the package has no such name.

    The room's own file comes first. The others are read only if a system's part lives in another room.
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
    """Return the package that publishes a module's names."""
    _, room, *rest = module.split(".")
    return "ops.functional" if room == "ops" and rest[:1] == ["functional"] else room


@cache
def shelf(room: str) -> Shelf:
    """Read and check the catalogue's file of a room; a malformed one raises `CatalogError`."""
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
