"""Methods of a user's own in a comparison, as objects: they need no catalogue and no budget."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

from torch import Tensor

from foveate.bench.known import FULL
from foveate.bench.methods import Calibrations, Contender, method_options
from foveate.bench.parts import digest
from foveate.core.errors import OptionError, shown
from foveate.host import Host, Method
from foveate.host.method import describe
from foveate.kv.parts.calibration_store import digest as tensors_digest


class OwnContender(Contender):
    """A method as one entry of a comparison, the same at every length of a prompt.

    Args:
        key: the name of its row.
        host: the model.
        method: the method.
    """

    def __init__(self, key: str, host: Host, method: Method) -> None:
        super().__init__(FULL, host, 1.0)
        self.key, self.method, self.title = key, method, f"a method of one's own: {type(method).__name__}"

    def calibrate(self, calibrations: Calibrations) -> None:
        """Do nothing: the method is ready."""

    @property
    def identity(self) -> str:
        tensors = {name: value for name, value in describe(self.method).items() if isinstance(value, Tensor)}
        return digest.of("own", repr(self.method), _source(type(self.method)), tensors_digest(tensors))

    def at(self, length: int) -> tuple[Method, ...]:
        return (self.method,)

    def options(self, lengths: Iterable[int]) -> dict[str, Any]:
        return method_options(self.method)


def named(methods: Sequence[str | Method] | None) -> tuple[list[str] | None, dict[str, Method]]:
    """Return the keys of a list of keys and methods, and the methods by theirs: the names of their classes."""
    if methods is None:
        return None, {}
    if isinstance(methods, str | Method) or not all(isinstance(each, str | Method) for each in methods):
        raise OptionError(f"methods must be a list of keys, recipes' files and methods; got {shown(methods)}")
    keys, own = list[str](), dict[str, Method]()
    for each in methods:
        if isinstance(each, str):
            keys.append(each)
            continue
        name = type(each).__name__
        same = sum(key.partition(" ")[0] == name for key in own)
        keys.append(f"{name} {same + 1}" if same else name)
        own[keys[-1]] = each
    return keys, own


def _source(cls: type) -> str:
    """Return the source of a class; something new where there is none, so that no stored answer is used again."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return uuid4().hex
