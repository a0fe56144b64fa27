"""Every operator, layer, gate, method, objective and initialiser refuses an option of the wrong type, in one line."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from foveate.core.catalog import systems
from foveate.core.errors import OptionError
from foveate.host import Method
from foveate.nn import MultiHeadAttention
from tests.contracts.gates import GATES
from tests.contracts.gaze import MODELS, SEARCHERS
from tests.contracts.initialisers import CLASSES as INITIALISERS
from tests.contracts.layers import SYSTEMS
from tests.contracts.objectives import CLASSES as OBJECTIVES
from tests.contracts.operators import CLASSES

METHODS = {row.key: found for room in ("kv", "steer", "lens") for row in systems(room=room) if (found := row.load())}
METHODS = {key: cls for key, cls in METHODS.items() if isinstance(cls, type) and issubclass(cls, Method)}
BUILT: dict[str, type] = {
    **CLASSES, **SYSTEMS, **GATES, **METHODS, **OBJECTIVES, **INITIALISERS, **MODELS, **SEARCHERS,
    "multi_head": MultiHeadAttention,
}  # fmt: skip

#: Values that an annotation excludes.
WRONG: dict[object, tuple[Any, ...]] = {
    int: (2.5, "2", True, None),
    float: ("half", True, None),
    bool: (1, "yes", None),
    torch.Generator: (0, "seed"),
}


def wrong_options() -> list[Any]:
    found = []
    for key, cls in BUILT.items():
        hints = get_type_hints(cls if is_dataclass(cls) else cls.__init__)
        for name in inspect.signature(cls).parameters:
            parts = get_args(hints.get(name)) or (hints.get(name),)
            if get_origin(hints.get(name)) is Literal:
                values: tuple[Any, ...] = ("nonsense", 2.5, [])
            elif len(parts) == 1 or (len(parts) == 2 and type(None) in parts):
                values = tuple(x for x in WRONG.get(parts[0], ()) if x is not None or len(parts) == 1)
            else:
                continue
            found += [pytest.param(cls, name, value, id=f"{key}-{name}-{value}") for value in values]
    return found


@pytest.mark.parametrize(("cls", "name", "value"), wrong_options())
def test_an_option_of_the_wrong_type_is_refused_by_name(cls: type, name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        cls(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} must be ")
    assert "\n" not in message


def test_all_systems_are_checked() -> None:
    seen = {case.values[0] for case in wrong_options()}
    assert len(seen) > 40 and len(METHODS) >= 6
    assert sum(case.values[1] == "generator" for case in wrong_options()) >= 14


def takes_any(cls: type) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(cls).parameters.values())


@pytest.mark.parametrize("key", [key for key, cls in BUILT.items() if not takes_any(cls)])
def test_an_option_that_is_misspelled_is_refused_with_the_one_that_is_meant(key: str) -> None:
    cls = BUILT[key]
    every = list(inspect.signature(cls).parameters)
    known = [name for name in every if len(name) > 3 and f"{name}s" not in every]
    for name in known[:2]:
        with pytest.raises(OptionError) as caught:
            cls(**{name + "s": 1})
        assert str(caught.value) == f'{cls.__name__} has no option "{name}s"; did you mean "{name}"?'
    with pytest.raises(OptionError, match=f'{cls.__name__} has no option "zzzzzz"; '):
        cls(zzzzzz=1)
