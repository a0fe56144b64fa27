"""Calls by name, `attend(q, k, v, "hip", ...)`, and operators built from their keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch

from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError, nearest, shown
from foveate.ops.operator import Operator

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.core.call import Plan

#: The seed of drawn parameters, for calls without a generator.
SEED = 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, op: str | type[Operator] | Operator = "softmax", *,
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None, engine: str = "auto",
    inputs: Mapping[str, Tensor] | None = None, generator: torch.Generator | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Attend with any operator of the catalogue.

    >>> q = k = v = torch.randn(1, 8, 1024, 64)
    >>> foveate.attend(q, k, v, "sliding_window", causal=True, window=256).shape
    torch.Size([1, 8, 1024, 64])

    Args:
        q, k, v: `(B, Hq, Nq, D)`, `(B, Hkv, Nk, D)`, `(B, Hkv, Nk, Dv)`.
        op: a catalogue key, an `Operator`, or its class.
        mask, causal, scale, engine: as for `Operator.forward`.
        inputs: per-token inputs of the mechanism by name, such as `{"poses": ...}`; see `Capabilities.inputs`. They may
            also be given as keywords of their own.
        generator: draws the parameters of an operator that has some. Without one they are the same in every call.
        options: the operator's own, such as `window=256`. The sizes of q, k and v (`heads`, `head_dim`, `value_dim`)
            are filled in.

    Raises:
        ShapeError, OptionError: a malformed call.
        UnknownKey: no such system.
        UnsupportedPattern: something that the mechanism does not define.
    """
    made, given = _made(q, k, v, op, inputs, generator, options)
    return made(q, k, v, mask=mask, causal=causal, scale=scale, engine=engine, **given)


def plan(
    q: Tensor, k: Tensor, v: Tensor, op: str | type[Operator] | Operator = "softmax", *,
    mask: Tensor | None = None, causal: bool = False, scale: float | None = None, engine: str = "auto",
    inputs: Mapping[str, Tensor] | None = None, generator: torch.Generator | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """Return the cost of `attend` with the same arguments, the engine that would compute it, and the reason."""
    made, given = _made(q, k, v, op, inputs, generator, options)
    return made.plan(q, k, v, mask=mask, causal=causal, scale=scale, engine=engine, **given)


def create(op: str | type[Operator] | Operator, /, **options: Any) -> Operator:
    """Build the operator with this catalogue key or of this class; return an `Operator` unchanged.

    Raises:
        OptionError: options that do not fit; the message names the nearest valid or the missing one.
    """
    if isinstance(op, Operator):
        if options:
            raise OptionError(f"options {sorted(options)} go with a key; {op.name} is already built")
        return op
    cls, name = (op, op.__name__) if isinstance(op, type) else (_class(op), op)
    known = _constructor(cls)
    for option in options:
        if option not in known:
            near = nearest(option, known)
            hint = f'did you mean "{near}"?' if near else f"options: {', '.join(known) or 'none'}"
            raise OptionError(f'operator "{name}" has no option "{option}"; {hint}')
    missing = [each for each, required in known.items() if required and each not in options]
    if missing:
        raise OptionError(f'operator "{name}" needs {", ".join(f"{each}=..." for each in missing)}')
    return cls(**options)


def sized(
    op: str | type[Operator] | Operator, heads: int, head_dim: int, value_dim: int | None = None, **options: Any
) -> Operator:
    """Build an operator for calls of these sizes; a class that takes sizes gets them."""
    if isinstance(op, Operator):
        return create(op, **options)
    known = _constructor(op if isinstance(op, type) else _class(op))
    sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim}
    return create(op, **{name: size for name, size in sizes.items() if name in known}, **options)


def _made(
    q: Tensor, k: Tensor, v: Tensor, op: str | type[Operator] | Operator, inputs: Mapping[str, Tensor] | None,
    generator: torch.Generator | None, options: dict[str, Any],
) -> tuple[Operator, dict[str, Tensor]]:  # fmt: skip
    """Return the operator of a call, and the call's per-token inputs."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise OptionError(f"generator={shown(generator)} must be a torch.Generator or None")
    given = dict(inputs or {})
    known: Mapping[str, bool] = {}
    if not isinstance(op, Operator):
        cls = op if isinstance(op, type) else _class(op)
        known, own = _constructor(cls), cls.capabilities.inputs
        given |= {name: options.pop(name) for name in list(options) if name in own and name not in known}
    else:
        given |= {name: options.pop(name) for name in list(options) if name in op.capabilities.inputs}
        return create(op, **options), given
    if not known:  # nothing to choose, and nothing to draw
        return create(op, **options), given
    if generator is not None and "generator" in known:
        options["generator"] = generator
    sizes = _sizes(q, v)
    options = {**{name: size for name, size in sizes.items() if name in known}, **options}
    with _drawing(generator):
        made = create(op, **options)
    first = next(made.parameters(), None)
    if first is not None and first.device != q.device:
        made = made.to(q.device)
    return made, given


def _sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    """Return the sizes of the tensors, or none if they are malformed; the call itself then raises."""
    fits = all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, v))
    return {"heads": q.shape[1], "head_dim": q.shape[3], "value_dim": v.shape[3]} if fits else {}


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    """Draw parameters from a seed, and restore PyTorch's own generator."""
    source = torch.default_generator
    before = source.get_state()
    seed = SEED
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    source.manual_seed(seed)
    try:
        yield
    finally:
        source.set_state(before)


@cache
def _constructor(cls: type[Operator]) -> dict[str, bool]:
    """Return the options of a class, and for each whether it is required."""
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {
        name: option.default is option.empty
        for name, option in signature(cls).parameters.items()
        if option.kind not in kinds
    }


@cache
def _class(key: str) -> type[Operator]:
    found = system(key).load()
    if not (isinstance(found, type) and issubclass(found, Operator)):
        known = ", ".join(row.key for row in systems(room="ops"))
        raise OptionError(f'system "{key}" is no operator; operators: {known}')
    return found
