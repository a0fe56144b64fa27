"""What `foveate compare` takes by name; read without torch, so that `--help` can list it."""

from __future__ import annotations

from foveate.core import catalog
from foveate.core.catalog import systems
from foveate.core.errors import OptionError, unknown

FULL = "full"
#: The full cache with grouped heads packed: nothing is dropped, and decoding is faster.
PACKED = "packed"
DEFAULT = (
    FULL, "sink_recent", "duo_attention", "razor_attention", "token_select", "tidal_decode", "recycled_attention",
    "hip",
)  # fmt: skip
#: Causal operators that cannot stand in for a model's attention: Aaren asks one question, a model's tokens many.
_ASK_OTHERWISE = ("aaren",)


def policies() -> list[str]:
    """Keys of the methods that act on a decoder's cache or attention."""
    return [row.key for room in ("kv", "steer") for row in systems(room=room)]


def readers() -> list[str]:
    """Keys of the operators that can read a prompt in the place of a decoder's attention: the causal ones."""
    causal = [row.key for row in systems(room="ops") if "causal self" in catalog.capabilities(row.key)["patterns"]]
    return [key for key in causal if key not in _ASK_OTHERWISE]


def methods() -> list[str]:
    """Every key that `compare` takes."""
    return [FULL, PACKED, *policies(), *readers()]


def check(keys: list[str]) -> None:
    """Refuse unknown or repeated keys before anything is loaded."""
    for key in keys:
        if key not in methods():
            raise unknown("method", key, methods())
    if len(set(keys)) < len(keys):
        raise OptionError(f"methods={','.join(keys)} names one twice")
