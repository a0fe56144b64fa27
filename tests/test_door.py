"""`import foveate`: light, complete, and the same for people and for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate.core.catalog import systems


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
