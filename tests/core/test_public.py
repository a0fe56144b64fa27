"""Public names of a package: listed, imported on first access, and suggested where a name is unknown."""

from __future__ import annotations

import pytest

import foveate.kv
from foveate.core.catalog import public_names
from foveate.core.public import hint, lazy, stub


def test_a_package_lists_its_public_names_and_not_the_helper() -> None:
    names = dir(foveate.kv)
    assert set(public_names("kv")) <= set(names) and "lazy" not in names and "lazy" in vars(foveate.kv)
    assert names == sorted(names) and foveate.kv.__all__ == list(public_names("kv"))


def test_a_name_is_imported_on_first_access_and_kept() -> None:
    get, _ = lazy("foveate.kv")
    vars(foveate.kv).pop("SinkRecent", None)
    assert get("SinkRecent").__name__ == "SinkRecent"
    assert vars(foveate.kv)["SinkRecent"] is foveate.kv.SinkRecent


def test_an_unknown_name_is_answered_with_its_room_or_the_nearest_name() -> None:
    with pytest.raises(AttributeError, match=r"'foveate.kv' has no attribute 'Lens'; it is foveate.lens.Lens$"):
        lazy("foveate.kv")[0]("Lens")
    with pytest.raises(AttributeError, match='did you mean "SinkRecent"'):
        lazy("foveate.kv")[0]("SinkRecnt")
    assert hint("_private", ["private"]) == "" and hint("qqqqqq", ["SinkRecent"]) == ""
    with pytest.raises(AttributeError, match="no attribute '__path_of__'$"):
        lazy("foveate.kv")[0]("__path_of__")


def test_a_stub_names_every_public_name_once() -> None:
    text = stub("kv")
    assert [text.count(f" import {name} as {name}\n") for name in public_names("kv")] == [1] * len(public_names("kv"))
