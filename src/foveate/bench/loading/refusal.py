"""Refusals of a model in one line, and readers by others kept from saying more than that."""

from __future__ import annotations

import logging as python_logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

from foveate.core.errors import FoveateError, UnsupportedModel

_SHOWN = 3  # names in a message before it says how many more there are

_LONGEST = 240  # characters of somebody else's message
#: Errors that readers raise with a sentence about the file.
_TELLING = (OSError, ValueError, ImportError, RuntimeError)


def refused(name: str, why: str) -> UnsupportedModel:
    """The error for a model that cannot be run."""
    shown = name if len(name) <= _LONGEST else name[:_LONGEST] + "..."
    return UnsupportedModel(f"model={shown!r} {why}")


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that follows it; its type too where the words alone say little."""
    if "trust_remote_code" in str(error):
        return "it runs code of its own, which --trust-remote-code allows (read the code first)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = lines[0] if isinstance(error, _TELLING) else f"{type(error).__name__}: {lines[0]}"
    return told if len(told) <= _LONGEST else told[:_LONGEST] + "..."


def several(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


@contextmanager
def reading(name: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Turn whatever a reader of files raises into one line.

    The readers are transformers, tokenizers, safetensors, gguf and peft. Between them they raise bare `Exception`, a
    dozen subclasses and Rust panics for files that are broken, and nothing but their calls stands inside this block.
    """
    try:
        with quiet():
            yield
    except (FoveateError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  see above
        raise refused(name, f"{what}: {first_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
            raise
        raise refused(name, f"{what}: {first_line(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would run into ours, and its reports, which we make ourselves."""
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
