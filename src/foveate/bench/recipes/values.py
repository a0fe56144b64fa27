"""The values of options as JSON, and back. Nothing but plain data is read, so that a file cannot run code.

Numbers, texts, true, false and null stand for themselves, and a list for a tuple. An object has a single name, which
says what it holds: a "tensor" in the file of tensors, a number that JSON lacks, a "map", a "record" of options, or
another "method".
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from foveate.core.errors import OptionError, shown
from foveate.host import Method

_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass
class Tensors:
    """The tensors of a recipe, by name.

    Args:
        named: what the file holds.
    """

    named: dict[str, Tensor] = field(default_factory=dict)

    def add(self, where: str, tensor: Tensor) -> str:
        """Add a tensor under the name of its place."""
        self.named[where] = tensor.detach().cpu().clone()  # a file holds no two views of one memory
        return where

    def get(self, where: str, name: object) -> Tensor:
        if not isinstance(name, str) or name not in self.named:
            raise OptionError(f"{where}: the file of tensors has no {shown(name)}")
        return self.named[name]


def to_json(value: Any, where: str, tensors: Tensors, method: Callable[[Method, str], Any]) -> Any:
    """Return an option's value as JSON data.

    Args:
        value: the value.
        where: the option's place, such as "0.base.share".
        tensors: gets the tensors.
        method: converts a method that is an option of another one.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"number": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": tensors.add(where, value)}
    if isinstance(value, tuple | list):
        return [to_json(item, f"{where}.{number}", tensors, method) for number, item in enumerate(value)]
    if isinstance(value, Mapping):
        pairs = [(key, item) for key, item in value.items()]
        return {"map": [[key, to_json(item, f"{where}.{key}", tensors, method)] for key, item in pairs]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Method):
        return method(value, where)
    if is_dataclass(value) and not isinstance(value, type):
        some = {item.name: getattr(value, item.name) for item in fields(value) if item.init}
        return {"record": {name: to_json(item, f"{where}.{name}", tensors, method) for name, item in some.items()}}
    raise OptionError(f"{where}: a recipe cannot hold a {type(value).__name__}")


def from_json(raw: Any, where: str, annotation: Any, tensors: Tensors, method: Callable[[Any, str], Any]) -> Any:
    """Return the value of an option; the counterpart of `to_json`.

    Args:
        annotation: the option's type, which names the classes that a record may become.
        method: makes a method from its JSON data.
    """
    if raw is None or isinstance(raw, bool | int | float | str):
        return raw
    if isinstance(raw, list):
        return tuple(from_json(item, f"{where}.{n}", annotation, tensors, method) for n, item in enumerate(raw))
    if "method" in raw:
        return method(raw, where)
    kind, content = next(iter(raw.items())) if len(raw) == 1 else ("", None)
    if kind == "tensor":
        return tensors.get(where, content)
    if kind == "number" and content in _NUMBERS:
        return _NUMBERS[content]
    if kind == "dtype" and isinstance(found := getattr(torch, str(content), None), torch.dtype):
        return found
    if kind == "map" and isinstance(content, list) and all(map(_is_pair, content)):
        return {key: from_json(item, f"{where}.{key}", annotation, tensors, method) for key, item in content}
    if kind == "record" and isinstance(content, dict):
        return _record(content, where, annotation, tensors, method)
    raise OptionError(f"{where}={shown(raw)} is no value of an option")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int)


def _record(content: dict, where: str, annotation: Any, tensors: Tensors, method: Callable[[Any, str], Any]) -> Any:
    for cls in _records(annotation):
        hints = hints_of(cls)
        if set(content) <= {item.name for item in fields(cls) if item.init}:
            given = {
                name: from_json(item, f"{where}.{name}", hints.get(name), tensors, method)
                for name, item in content.items()
            }
            return cls(**given)
    raise OptionError(f"{where}={shown(content)} has options that are not known")


def _records(annotation: Any) -> list[type]:
    """Return the dataclasses of an annotation that are no methods."""
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, dict):
        return [cls for part in get_args(annotation) for cls in _records(part)]
    plain = isinstance(annotation, type) and is_dataclass(annotation) and not issubclass(annotation, Method)
    return [annotation] if plain else []


def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a class's options."""
    try:
        return get_type_hints(cls if is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
    except NameError:  # an annotation that only a type checker can read
        return {}
