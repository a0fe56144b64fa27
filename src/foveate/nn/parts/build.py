"""Layers and gates by name, for saved networks, command lines and tables of comparisons."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, overload

from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.base.layer import Layer
from foveate.nn.parts.insert import gate_class
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


@overload
def create(key: str, dim: int, heads: int, *, options: dict[str, Any] | None = None, **around: Any) -> Layer: ...


@overload
def create(key: str, *, channels: int, dims: int | None = None, **options: Any) -> FeatureGate: ...


def create(
    key: str, dim: int | None = None, heads: int | None = None, *, channels: int | None = None,
    dims: int | None = None, options: dict[str, Any] | None = None, **around: Any,
) -> Layer | FeatureGate:  # fmt: skip
    """Make a layer for tokens of width `dim`, or a gate for maps of so many `channels`, from a key of the catalogue.

        create("softmax", 64, 4)                        # tokens (B, N, 64)
        create("ulsam", channels=64, num_splits=8)      # maps (B, 64, H, W)

    Args:
        key: the key of a layer, of a gate, or of an operator, which gets a `MultiHeadAttention` around it.
        dim, heads: C and H of a layer. A gate may have `heads` too.
        channels: C of a gate.
        dims: number of spatial axes of the gate's maps, 1, 2 or 3; None for the gate's own default, which is 2, or any
            where one object serves all.
        options: a layer's or an operator's own.
        around: options of `MultiHeadAttention`, with `position` by name; with `channels`, the gate's own.

    Raises:
        UnknownKey: no such system. OptionError: a system that is none of these, or options that do not fit.
    """
    if channels is not None:
        if dim is not None:
            raise OptionError(f"channels={channels} is of a gate, and must come without dim={dim}, of a layer")
        own = {**(options or {}), **around, **({} if heads is None else {"heads": heads})}
        cls = gate_class(key)
        return cls(channels, **own) if dims is None else cls.for_map(channels, dims, **own)
    if dim is None or heads is None or dims is not None:
        raise OptionError("create must get dim and heads for a layer; or channels for a gate, which may have dims")
    return _layer(key, dim, heads, options or {}, around)


def _layer(key: str, dim: int, heads: int, options: dict[str, Any], around: dict[str, Any]) -> Layer:
    cls = system(key).load()
    if isinstance(cls, type) and issubclass(cls, Operator):
        around = {**around, "position": position(around.get("position"), heads)}
        head_dim = around.get("head_dim") or dim // heads
        op = sized(key, heads, head_dim, around.get("value_dim") or head_dim, **options)
        return MultiHeadAttention(dim, heads, op=op, **around)
    if isinstance(cls, type) and issubclass(cls, Layer):
        if around:
            raise OptionError(f"{', '.join(sorted(around))} must come with an operator's key; {key} is a layer")
        known = signature(cls).parameters
        given = {**{name: size for name, size in {"heads": heads}.items() if name in known}, **options}
        try:
            return cls(dim, **given)
        except TypeError as error:
            raise OptionError(f'layer "{key}": {error}') from None
    if isinstance(cls, type) and issubclass(cls, FeatureGate):
        raise OptionError(f'gate "{key}" must get channels in the place of dim and heads')
    usable = ", ".join(row.key for room in ("ops", "nn") for row in systems(room=room))
    raise OptionError(f'system "{key}" must be an operator or a layer; valid keys: {usable}')
