"""Layers by name, for saved networks, command lines and tables of comparisons."""

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
    """Make the position scheme of this name for so many heads."""
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
    """Make a layer for tokens of width `dim`, from the key of an operator or of a layer.

    Args:
        key: a layer's key, or an operator's, which gets a `MultiHeadAttention` around it.
        dim, heads: C and H.
        options: the system's own.
        around: options of `MultiHeadAttention`, with `position` by name; only for operators.

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
            raise OptionError(f"{', '.join(sorted(around))} must come with an operator's key; {key} is a layer")
        known = signature(cls).parameters
        given = {**{name: size for name, size in {"heads": heads}.items() if name in known}, **(options or {})}
        try:
            return cls(dim, **given)
        except TypeError as error:
            raise OptionError(f'layer "{key}": {error}') from None
    usable = ", ".join(row.key for room in ("ops", "nn") for row in systems(room=room))
    raise OptionError(f'system "{key}" must be an operator or a layer; valid keys: {usable}')
