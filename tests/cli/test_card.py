"""Cards are read from sources of every form that a system may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.cli import card
from foveate.cli.card import read_card
from foveate.core.catalog import systems
from foveate.core.errors import CatalogError

BASE = '''
from dataclasses import dataclass

@dataclass
class Policy:
    """A base."""
    budget: float = 0.5
    seed: int = 0
'''

SYSTEMS = '''
from dataclasses import dataclass, field
from typing import ClassVar
from foveate.kv.base import Policy as Base

@dataclass
class Derived(Base):
    """Describe it.

    More of it.
    """
    tags: ClassVar[tuple] = ()
    seed: int = 7
    heads: list[int] = field(default_factory=list)
    sink: int = field(default=4, repr=False)
    window: int = field(repr=False)
    _hidden: int = 0

class Inherits(Derived):
    state: dict

class Generic(Derived[int], some.Other):
    """Bases that cannot be followed are left out."""

class Built(Base):
    """Has its own arguments."""
    def __init__(self, dim, /, heads: int = 8, *rest, keep: "int | float" = 0.5, must: bool, **others):
        pass

def function(q, scale: float | None = None):
    """A function."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "base.py").write_text(BASE)
    (tmp_path / "kv" / "__init__.py").write_text(SYSTEMS)
    monkeypatch.setattr(card, "_PACKAGE", tmp_path)


DERIVED = ["budget: float = 0.5", "seed: int = 7", "heads: list[int] = list()", "sink: int = 4", "window: int"]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "doc", "options"),
    [
        ("Derived", "Describe it.\n\nMore of it.", DERIVED),
        ("Inherits", "", DERIVED),
        ("Generic", "Bases that cannot be followed are left out.", DERIVED),
        ("Built", "Has its own arguments.", ["dim", "heads: int = 8", "keep: 'int | float' = 0.5", "must: bool"]),
        ("function", "A function.", ["q", "scale: float | None = None"]),
    ],
)
def test_a_card_has_docstring_and_options(name: str, doc: str, options: list[str]) -> None:
    found = read_card(f"foveate.kv:{name}")
    assert found.doc == doc
    assert found.options == options


@pytest.mark.usefixtures("package")
def test_missing_names_and_modules_are_refused() -> None:
    with pytest.raises(CatalogError, match=r"must be defined in foveate\.kv; its source has no Nothing"):
        read_card("foveate.kv:Nothing")
    with pytest.raises(CatalogError, match=r"module='foveate\.vk' must be a module of foveate"):
        read_card("foveate.vk:Derived")


def test_every_catalogued_system_has_a_card() -> None:
    for row in systems():
        assert read_card(row.object).doc, f"{row.key}: {row.object} has no docstring"
