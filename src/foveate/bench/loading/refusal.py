"""One-line errors for models that cannot be loaded, and silence from the libraries that read them."""

from __future__ import annotations

import logging as python_logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

from foveate.core.errors import FoveateError, UnsupportedModel

_SHOWN = 3  # the most names in a message

_LONGEST = 240  # the most characters of another library's message
#: Errors whose messages describe the problem without the name of their type.
_DESCRIPTIVE = (OSError, ValueError, ImportError, RuntimeError)


def refused(name: str, why: str) -> UnsupportedModel:
    """Return the error for a model that cannot be used."""
    shown = name if len(name) <= _LONGEST else name[:_LONGEST] + "..."
    return UnsupportedModel(f"model={shown!r} {why}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with its type if the message alone is unclear."""
    if "trust_remote_code" in str(error):
        return "it runs code of its own, which --trust-remote-code allows (read the code first)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[0] if isinstance(error, _DESCRIPTIVE) else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def several(names: Iterable[str]) -> str:
    """List a few names, and the number of the others."""
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


@contextmanager
def reading(name: str, problem: str = "cannot be loaded") -> Iterator[None]:
    """Turn any error of a library that reads files into one line.

    The libraries are transformers, tokenizers, safetensors, gguf and peft. For damaged files they raise plain
    `Exception`, many subclasses and Rust panics, so that this catches all; put only their calls inside the block.
    """
    try:
        with quiet():
            yield
    except (FoveateError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  see above
        raise refused(name, f"{problem}: {first_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic, which does not derive from Exception
            raise
        raise refused(name, f"{problem}: {first_line(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars, warnings and reports; the caller reports instead."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(python_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
