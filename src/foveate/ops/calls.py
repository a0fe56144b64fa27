"""Calls by name: `attend(q, k, v, "hip", ...)`, and operators made from their keys."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError
from foveate.ops.operator import Operator

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.core.call import Plan


def create(key: str | type[Operator] | Operator, /, **options: Any) -> Operator:
    """The operator with this catalogue key, built with `options`; an `Operator` is returned as it is."""
    if isinstance(key, Operator):
        if options:
            raise OptionError(f"options {sorted(options)} go with a key; {key.name} is already built")
        return key
    cls = key if isinstance(key, type) else _class(key)
    try:
        return cls(**options)
    except TypeError as error:
        asked = signature(cls).parameters.values()
        missing = [option.name for option in asked if option.default is option.empty and option.name not in options]
        if "missing" in str(error):  # and no option that it lacks
            raise OptionError(f'operator "{key}" needs {", ".join(f"{name}=..." for name in missing)}') from None
        raise OptionError(f'operator "{key}": {error}') from None


def sized(
    key: str | type[Operator] | Operator, heads: int, head_dim: int, value_dim: int | None = None, **options: Any
) -> Operator:
    """The operator with this key, built for calls of such a size: where its class asks for sizes, it gets these."""
    if isinstance(key, Operator):
        return create(key, **options)
    cls = key if isinstance(key, type) else _class(key)
    known = signature(cls).parameters
    sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim}
    return create(key, **{name: size for name, size in sizes.items() if name in known}, **options)


def _class(key: str) -> type[Operator]:
    found = system(key).load()
    if not (isinstance(found, type) and issubclass(found, Operator)):
        known = ", ".join(row.key for row in systems(room="ops"))
        raise OptionError(f'system "{key}" is no operator; operators: {known}')
    return found


def attend(
    q: Tensor, k: Tensor, v: Tensor, key: str | Operator = "softmax", *,
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None, engine: str = "auto", **options: Any,
) -> Tensor:  # fmt: skip
    """Attend with any operator of the catalogue.

    >>> q = k = v = torch.randn(1, 8, 1024, 64)
    >>> foveate.attend(q, k, v, "sliding_window", causal=True, window=256).shape
    torch.Size([1, 8, 1024, 64])

    Args:
        q, k, v: `(B, Hq, Nq, D)`, `(B, Hkv, Nk, D)`, `(B, Hkv, Nk, Dv)`.
        key: a catalogue key or an `Operator`.
        mask, causal, scale, engine: as for `Operator.forward`.
        options: the operator's own, such as `window=256`.
    """
    return create(key, **options)(q, k, v, mask=mask, causal=causal, scale=scale, engine=engine)  # type: ignore[no-any-return]


def plan(
    q: Tensor, k: Tensor, v: Tensor, key: str | Operator = "softmax", *,
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None, engine: str = "auto", **options: Any,
) -> Plan:  # fmt: skip
    """Say what `attend` with the same arguments would cost, which engine would compute it, and why."""
    return create(key, **options).plan(q, k, v, mask=mask, causal=causal, scale=scale, engine=engine)
