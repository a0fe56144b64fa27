"""Options of a command from a TOML file: `steps = 500` means `--steps 500`; the command line takes precedence."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from foveate.core.errors import OptionError, unknown

_NOT_IN_FILES = ("help", "config")


def read(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of the file at `path` the command's defaults; this is the callback of `--config`.

    Raises:
        OptionError: if the file cannot be read.
        UnknownKey: if the command has no such option.
    """
    if path is None:
        return None
    try:
        given = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise OptionError(f"config={str(path)!r} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"config={str(path)!r} is not TOML: {error}") from None
    known = _options(context)
    given = {name.replace("-", "_"): value for name, value in given.items()}
    for name in given:
        if name not in known:
            raise unknown(f"option in {path}", name, known)
    defaults = {known[name].name: value if known[name].multiple else _text(value) for name, value in given.items()}
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _options(context: typer.Context) -> dict[str, Any]:
    """Return the options' names on the command line, with their parameters."""
    found = {}
    for parameter in context.command.params:
        name = max(parameter.opts, key=len).lstrip("-").replace("-", "_")
        if name not in _NOT_IN_FILES and parameter.name is not None:
            found[name] = parameter
    return found


def _text(value: Any) -> Any:
    """Write lists and tables in the form of one option on the command line."""
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, dict):
        return ",".join(f"{name}={item!r}" for name, item in value.items())
    return value
