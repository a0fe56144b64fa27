"""The errors that Foveate raises on purpose.

Every public call raises a `FoveateError` for invalid input. Its message is one line that names the argument, the value
and the valid values, so that the command line can print it unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class FoveateError(Exception):
    """Base of all errors that Foveate raises on purpose."""


class ShapeError(FoveateError, ValueError):
    """A tensor has the wrong rank, length, head count or dtype."""


class OptionError(FoveateError, ValueError):
    """An option's value is outside what is valid."""


class DivergedError(FoveateError, ArithmeticError):
    """A training run, a memory that learns at test time or a solver of an equation ran off to NaN or inf."""


class Interrupted(KeyboardInterrupt):
    """An interrupt (Ctrl-C, SIGTERM) of a long run, raised after what is finished was saved.

    Attributes:
        done: finished parts: steps, answers or trainings.
        total: all parts.
        folder: the folder that the same call resumes from; None if the caller named it.
    """

    def __init__(self, done: int, total: int, folder: Path | None = None) -> None:
        super().__init__(f"interrupted after {done} of {total}")
        self.done, self.total, self.folder = done, total, folder


class UnknownKey(FoveateError, KeyError):
    """A name is not registered."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class UnsupportedPattern(FoveateError, NotImplementedError):
    """A call needs a form of attention that the operator's mechanism does not define."""


class UnsupportedEngine(FoveateError, NotImplementedError):
    """An engine cannot compute a call; no other engine replaces it."""


class UnsupportedModel(FoveateError, TypeError):
    """Foveate cannot attach to a model or cache, or load a checkpoint."""


class TaskError(FoveateError, ValueError):
    """A task file or an example cannot be run."""


class CatalogError(FoveateError, ValueError):
    """A row of the catalogue is malformed, or names an object that does not exist."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownKey:
    """Return an `UnknownKey` that suggests the nearest valid name."""
    options = sorted(known)
    near = nearest(str(name), options)
    hint = f'; did you mean "{near}"?' if near else f"; known: {', '.join(options) or 'none'}"
    return UnknownKey(f'unknown {kind} "{name}"{hint}')


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the most similar valid name, or None if none is similar."""
    spelled = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.5)
    return spelled[near[0]] if near else None


def shown(value: object) -> str:
    """Return a value for a message, on one short line: a tensor as its shape and dtype."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{type(value).__name__} {tuple(shape)} {str(dtype).removeprefix('torch.')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
