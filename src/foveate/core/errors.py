"""What can go wrong at Foveate's surface.

Every public call raises a `FoveateError` for input it cannot take. Its message is one line that names the argument,
what came and what is valid, so that the command line can print it as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FoveateError(Exception):
    """Base of all errors that Foveate raises on purpose."""


class ShapeError(FoveateError, ValueError):
    """A tensor has the wrong rank, length, head count or dtype."""


class OptionError(FoveateError, ValueError):
    """An option's value is outside what is valid."""


class DivergedError(FoveateError, ArithmeticError):
    """A training run whose loss is no number any more."""


class UnknownKey(FoveateError, KeyError):
    """A name that nothing is registered under."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class UnsupportedPattern(FoveateError, NotImplementedError):
    """An operator was asked to attend in a way that its mechanism does not define."""


class UnsupportedEngine(FoveateError, NotImplementedError):
    """An engine cannot compute what was asked of it; nothing else is run in its place."""


class UnsupportedModel(FoveateError, TypeError):
    """A model, cache or checkpoint that Foveate cannot attach to or load."""


class TaskError(FoveateError, ValueError):
    """A task file or an example that cannot be run."""


class CatalogError(FoveateError, ValueError):
    """A row of the catalogue is malformed, or names an object that is not there."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownKey:
    """An `UnknownKey` that offers the nearest valid name."""
    options = sorted(known)
    near = nearest(str(name), options)
    hint = f'; did you mean "{near}"?' if near else f"; known: {', '.join(options) or 'none'}"
    return UnknownKey(f'unknown {kind} "{name}"{hint}')


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The valid name that is most like this one; None where none is much like it."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def shown(value: object) -> str:
    """Return a value as a message prints it, on one short line: of a tensor its shape and dtype."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{type(value).__name__} {tuple(shape)} {str(dtype).removeprefix('torch.')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
