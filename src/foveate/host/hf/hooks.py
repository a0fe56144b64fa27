"""Hooks that do nothing in a copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from foveate.core.errors import OptionError


class Hook:
    """A hook of a run on one model. It does nothing in a copy of that model, so that the copy is a plain model."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> NoReturn:
        raise OptionError("a model cannot be saved inside foveate.apply(model, ...); leave the block first")


def _nothing(*_: object, **__: object) -> None:
    """Do nothing."""
