"""Calls by name, `attend(q, k, v, "hip", ...)`, and operators built from their keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, isabstract, signature
from typing import TYPE_CHECKING, Any

import torch

from foveate.core.catalog import system, systems
from foveate.core.errors import OptionError, nearest, shown
from foveate.ops.operator import Operator

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.core.call import Plan
    from foveate.core.catalog import System

#: The seed of drawn parameters, for calls without a generator.
SEED = 0

#: One thread at a time draws: the draw borrows PyTorch's own generator.
_DRAWING = threading.Lock()

#: Arguments of `attend` beside an operator's options.
_ARGUMENTS = ("op", "mask", "causal", "scale", "engine", "inputs", "generator")


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
    cls = _class(op)
    name, known = op if isinstance(op, str) else cls.__name__, _constructor(cls)
    for option in options:
        if option not in known:
            raise OptionError(f'operator "{name}" has no option "{option}"; {_nearest_option(option, cls)}')
    missing = [each for each, required in known.items() if required and each not in options]
    if missing:
        raise OptionError(f'operator "{name}" needs {", ".join(f"{each}=..." for each in missing)}')
    return cls(**options)


def _nearest_option(option: str, cls: type[Operator]) -> str:
    """Return the end of an error: the option, input or argument of `attend` that was probably meant."""
    known = _constructor(cls)
    if option == "key":
        return "the operator itself is op=..."
    near = nearest(option, [*known, *cls.capabilities.inputs, *_ARGUMENTS])
    return f'did you mean "{near}"?' if near else f"options: {', '.join(known) or 'none'}"


def sized(
    op: str | type[Operator] | Operator, heads: int, head_dim: int, value_dim: int | None = None,
    kv_heads: int | None = None, **options: Any,
) -> Operator:  # fmt: skip
    """Build an operator for calls of these sizes; a class that takes sizes gets them."""
    if isinstance(op, Operator):
        return create(op, **options)
    known = _constructor(_class(op))
    sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "kv_heads": kv_heads}
    return create(op, **{name: size for name, size in sizes.items() if name in known}, **options)


def _made(
    q: Tensor, k: Tensor, v: Tensor, op: str | type[Operator] | Operator, inputs: Mapping[str, Tensor] | None,
    generator: torch.Generator | None, options: dict[str, Any],
) -> tuple[Operator, dict[str, Tensor]]:  # fmt: skip
    """Return the operator of a call, and the call's per-token inputs."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise OptionError(f"generator={shown(generator)} must be a torch.Generator or None")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise OptionError(f"inputs={shown(inputs)} must be a mapping from names to tensors, or None")
    if isinstance(op, Operator):
        given = _inputs(inputs, options, op.capabilities.inputs, {})
        made = create(op, **options)
    else:
        cls = _class(op)
        known = _constructor(cls)
        given = _inputs(inputs, options, cls.capabilities.inputs, known)
        options = {**{name: size for name, size in _sizes(q, k, v).items() if name in known}, **options}
        made = _built(op, options, generator, q.device) if known else create(op, **options)
    made._check_inputs(given)
    return made, given


def _inputs(
    inputs: Mapping[str, Tensor] | None, options: dict[str, Any], own: frozenset[str], known: Mapping[str, bool]
) -> dict[str, Tensor]:
    """Take the per-token inputs out of the options, and join them with those that are named as such."""
    given = {str(name): value for name, value in (inputs or {}).items()}
    for name in list(options):
        if name not in own or (name in known and not isinstance(options[name], torch.Tensor)):
            continue  # an option of the operator's own
        if name in given:
            raise OptionError(f'input "{name}" must be given once; it is in inputs={{...}} and a keyword')
        given[name] = options.pop(name)
    return given


def _built(
    op: str | type[Operator], options: dict[str, Any], generator: torch.Generator | None, device: torch.device
) -> Operator:
    """Build an operator whose class has options, its parameters drawn from the generator or from a fixed seed."""
    if generator is not None and "generator" in _constructor(_class(op)):
        try:
            return create(op, **options, generator=generator).to(device)
        except OptionError:  # the class draws only under other options
            pass
    with _DRAWING, _drawing(generator):
        return create(op, **options).to(device)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Return the sizes of the tensors, or none if they are malformed; the call itself then raises."""
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, k, v)):
        return {}
    return {"heads": q.shape[1], "head_dim": q.shape[3], "value_dim": v.shape[3], "kv_heads": k.shape[1]}


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    """Draw parameters from a seed on the CPU, and restore PyTorch's own generator.

    A transform such as `vmap` must not see the draw, and a default device must not take it.
    """
    source, seed = torch.default_generator, SEED
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    before = source.get_state()
    source.manual_seed(seed)
    try:
        with torch.device("cpu"), torch._C._DisableFuncTorch():
            yield
    finally:
        source.set_state(before)


@cache
def _constructor(cls: type[Operator]) -> dict[str, bool]:
    """Return the options of a class, and for each whether it is required."""
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {
        name: _is_required(option) for name, option in signature(cls).parameters.items() if option.kind not in kinds
    }


def _class(op: object) -> type[Operator]:
    """Return the class that a key names, or a class itself."""
    if isinstance(op, type) and issubclass(op, Operator) and not isabstract(op):
        return op
    if not isinstance(op, str):
        raise OptionError(f"op={shown(op)} must be a key of the catalogue, an Operator, or an operator's class")
    return _class_of(op)


@cache
def _class_of(key: str) -> type[Operator]:
    row = system(key)
    found = row.load()
    if not (isinstance(found, type) and issubclass(found, Operator)):
        raise OptionError(f'system "{key}" must be an operator; {_use(row, found)}')
    return found


def _use(row: System, found: object) -> str:
    """Return how a system that is no operator is used: as a layer, or as a method for pretrained models."""
    if not isinstance(found, type) or row.room not in ("nn", "kv", "steer", "lens"):
        return f"operators: {', '.join(each.key for each in systems(room='ops'))}"
    options = signature(found).parameters.items()
    needed = ", ".join(f"{name}=..." for name, option in options if _is_required(option))
    made = f"foveate.{row.room}.{found.__name__}({needed})"
    if row.room == "nn":
        return f"it is a layer, with weights of its own: layer = {made}"
    return f"it acts on a pretrained model: foveate.apply(model, {made})"


def _is_required(option: Parameter) -> bool:
    return option.default is option.empty and option.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
