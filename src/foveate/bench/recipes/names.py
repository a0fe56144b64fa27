"""The names of methods and operators in recipes: their keys in the catalogue."""

from __future__ import annotations

from functools import cache

from foveate.core.catalog import systems
from foveate.core.errors import OptionError, unknown
from foveate.host import Method, Packed
from foveate.kv.renumbered import Renumbered
from foveate.ops.operator import Operator

#: Methods that are no systems of the catalogue.
_OTHERS: dict[str, type[Method]] = {"packed": Packed, "renumbered": Renumbered}
_ROOMS = ("kv", "steer", "ops")


def class_of(name: str) -> type:
    """Return the method or operator of this name."""
    if name not in _known():
        raise unknown("method", name, _known())
    return _OTHERS[name] if name in _OTHERS else _load(name)


def name_of(cls: type) -> str:
    """Return the name of a method or an operator.

    Raises:
        OptionError: it has none, as the user's own methods.
    """
    target = f"{cls.__module__}:{cls.__qualname__}"
    for name, other in _OTHERS.items():
        if other is cls:
            return name
    for name, found in _known().items():
        if found == target:
            return name
    raise OptionError(f"{cls.__name__} is not in the catalogue, so that a recipe cannot name it")


@cache
def _known() -> dict[str, str]:
    """Return the names, and the object that each stands for."""
    rows = {row.key: row.object for room in _ROOMS for row in systems(room=room)}
    return rows | dict.fromkeys(_OTHERS, "")


def _load(name: str) -> type:
    found = next(row for room in _ROOMS for row in systems(room=room) if row.key == name).load()
    if not (isinstance(found, type) and issubclass(found, Method | Operator)):
        raise OptionError(f'"{name}" is no method that can be applied to a model')
    return found
