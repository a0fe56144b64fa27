"""Public names: `foveate.<room>.Name`, imported from the module that defines them on first access (PEP 562).

The catalogue's `[public]` tables, objects and parts are the only list of them. Module paths are private: they may
change in any release.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

#: A thread at a time: another one must not meet a module that is half imported.
_IMPORTING = threading.RLock()

Getattr = Callable[[str], Any]
Dir = Callable[[], list[str]]

#: Packages with public names, each with a stub.
PACKAGES = (
    "core", "ops", "ops.functional", "nn", "models", "host", "kv", "steer", "lens", "train", "tasks", "gaze",
    "studies", "bench", "report",
)  # fmt: skip


def lazy(package: str) -> tuple[Getattr, Dir]:
    """Return a package's `__getattr__` and `__dir__`: `__getattr__, __dir__ = lazy(__name__)` in its `__init__.py`."""
    room = package.removeprefix("foveate.")

    def get(name: str) -> Any:
        from foveate.core.catalog import module_of, public_names

        if name == "__all__":  # for `from foveate.kv import *` and `help`
            return list(public_names(room))
        module = None if name.startswith("__") else module_of(room, name)
        if module is None:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}{hint(name, public_names(room))}", name=name
            )
        with _IMPORTING:
            value = getattr(import_module(module), name)
        setattr(sys.modules[package], name, value)  # the next access skips __getattr__
        return value

    def names() -> list[str]:
        from foveate.core.catalog import public_names

        return sorted({*vars(sys.modules[package]), *public_names(room)} - {"lazy"})

    return get, names


def hint(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the room that has it, or the nearest known name."""
    from foveate.core.catalog import public_names
    from foveate.core.errors import nearest

    if name.startswith("_"):
        return ""
    for room in PACKAGES:
        if name in public_names(room):
            return f"; it is foveate.{room}.{name}"
    near = nearest(name, known)
    return f'; did you mean "{near}"?' if near else ""


def stub(package: str) -> str:
    """Return the text of a package's `__init__.pyi`, for editors and type checkers."""
    from foveate.core.catalog import public_names

    names = public_names(package)
    lines = [f"# The public names of foveate.{package}; written by `make systems` from the catalogue.", ""]
    lines += sorted(f"from {module} import {name} as {name}" for name, module in names.items())
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in names), "]"]
    return "\n".join(lines) + "\n"
