"""`import foveate`: light, complete, and the same for people and for type checkers."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate.core.catalog import public_names, systems
from foveate.core.public import PACKAGES, stub

ROOT = Path(__file__).parent.parent


def test_the_public_names_are_all_there() -> None:
    assert set(foveate.__all__) == set(dir(foveate))
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None
    assert foveate.systems is systems
    with pytest.raises(AttributeError, match="no attribute 'atend'"):
        foveate.atend  # noqa: B018


def test_type_checkers_see_the_names_that_users_get() -> None:
    tree = ast.parse(Path(foveate.__file__).read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == foveate._HOME | dict.fromkeys(foveate._ROOMS, "foveate")


def test_no_torch_is_imported() -> None:
    code = "import sys, foveate; foveate.systems(); foveate.FoveateError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_gives_its_names(package: str) -> None:
    room = importlib.import_module(f"foveate.{package}")
    names = public_names(package)
    assert set(names) <= set(dir(room))
    for name, module in names.items():
        assert getattr(room, name) is getattr(importlib.import_module(module), name), name
    with pytest.raises(AttributeError, match=f"module 'foveate.{package}' has no attribute 'Nowhere'"):
        room.Nowhere  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_the_stubs_are_those_of_the_catalogue(package: str) -> None:
    room = importlib.import_module(f"foveate.{package}")
    assert Path(str(room.__file__)).with_suffix(".pyi").read_text("utf-8") == stub(package), "run `make systems`"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_hides_a_module(package: str) -> None:
    folder = Path(str(importlib.import_module(f"foveate.{package}").__file__)).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(public_names(package))


def test_every_system_is_public_in_its_room() -> None:
    for row in systems():
        for target in (row.object, *row.parts):
            module, _, name = target.partition(":")
            assert name in public_names(module.split(".")[1]), target


def test_a_near_name_is_offered() -> None:
    from foveate import kv

    with pytest.raises(AttributeError, match='did you mean "RazorAttention"'):
        kv.RazorAtention  # noqa: B018


def test_modules_are_not_hidden_by_names() -> None:
    import foveate.ops.operator as module

    assert module.Operator is foveate.Operator


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/notebooks/*.ipynb"))]
)
def test_readers_are_shown_public_names_alone(page: str) -> None:
    """Module paths are private: what a page imports is a room's name."""
    text = (ROOT / page).read_text("utf-8")
    for module, names in re.findall(r"from foveate\.([\w.]+) import ([\w, ]+)", text):
        assert module in (*PACKAGES, "labs"), module
        room = importlib.import_module(f"foveate.{module}")
        assert all(hasattr(room, name.strip()) for name in names.split(","))
