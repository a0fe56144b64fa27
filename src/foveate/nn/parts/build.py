"""Layers by name: what a saved network, a command line or a table of comparisons says of a layer."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.positions import Alibi, Position, RelativeBias, Rotary
from foveate.ops.calls import sized
from foveate.ops.operator import Operator

POSITIONS = ("rotary", "alibi", "relative")


def position(name: str | None, heads: int) -> Position | None:
    """The scheme of this name, made for so many heads."""
    if name is None:
        return None
    if name not in POSITIONS:
        raise OptionError(f"position={name!r} must be one of {', '.join(POSITIONS)}, or None")
    schemes: dict[str, Callable[[], Position]] = {
        "rotary": Rotary,
        "alibi": lambda: Alibi(heads),
        "relative": lambda: RelativeBias(heads),
    }
    return schemes[name]()


def create(key: str, dim: int, heads: int, *, options: dict[str, Any] | None = None, **around: Any) -> Layer:
    """A layer for tokens of width `dim`, from the key of an operator or of a layer.

    Args:
        key: an operator's (a `MultiHeadAttention` is put around it) or a layer's.
        dim, heads: C and H.
        options: the system's own.
        around: options of `MultiHeadAttention`, with `position` by name; for operators only.

    Raises:
        UnknownKey: no such system. OptionError: a system that is neither, or options that do not fit.
    """
    cls = system(key).load()
    if isinstance(cls, type) and issubclass(cls, Operator):
        around = {**around, "position": position(around.get("position"), heads)}
        head_dim = around.get("head_dim") or dim // heads
        op = sized(key, heads, head_dim, around.get("value_dim") or head_dim, **(options or {}))
        return MultiHeadAttention(dim, heads, op=op, **around)
    if isinstance(cls, type) and issubclass(cls, Layer):
        if around:
            raise OptionError(f"{', '.join(sorted(around))} go around an operator; {key} is a whole layer")
        known = signature(cls).parameters
        given = {**{name: size for name, size in {"heads": heads}.items() if name in known}, **(options or {})}
        try:
            return cls(dim, **given)
        except TypeError as error:
            raise OptionError(f'layer "{key}": {error}') from None
    usable = ", ".join(row.key for room in ("ops", "nn") for row in systems(room=room))
    raise OptionError(f'system "{key}" is neither operator nor layer; of these rooms are: {usable}')
