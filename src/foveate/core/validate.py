"""Checks that refuse malformed calls before anything is computed."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, nearest, shown


def tensors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> None:
    """Check `q (B, Hq, Nq, D)`, `k (B, Hkv, Nk, D)`, `v (B, Hkv, Nk, Dv)`, and a mask for `(B, Hq, Nq, Nk)`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x)
    _together(q, k, v)
    if not isinstance(causal, bool):
        raise OptionError(f"causal={shown(causal)} must be True or False")
    batch, heads, n_queries, _ = q.shape
    if causal and n_queries > k.shape[2]:
        raise ShapeError(f"causal=True needs at least as many keys as queries; got Nq={n_queries}, Nk={k.shape[2]}")
    if mask is not None:
        attention_mask(mask, (batch, heads, n_queries, k.shape[2]), q.device)


def _tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} must be a tensor (B, H, N, D); got {type(x).__name__}")
    if x.dim() != 4 or x.shape[3] == 0:
        raise ShapeError(f"{name} must be (B, H, N, D) with D > 0; got {x.dim()} dimensions {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ShapeError(f"{name} must be floating point; got {x.dtype}")


def _together(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the sizes, the dtype and the device that q, k and v must share."""
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ShapeError(f"q, k, v must share the batch size; got {q.shape[0]}, {k.shape[0]}, {v.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ShapeError(f"k must be as wide as q (D={q.shape[3]}); got k {tuple(k.shape)}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError(f"k and v must share heads and length; got k {tuple(k.shape)}, v {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"q's heads (Hq={q.shape[1]}) must be a multiple of k's (Hkv={k.shape[1]})")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"q, k, v must share a dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k, v must be on one device; got {q.device}, {k.device}, {v.device}")


def attention_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a mask that does not fit `shape`, which is (B, Hq, Nq, Nk)."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"mask must be a bool tensor (True = may attend) or a float bias; got {got}")
    if mask.device != device:
        raise ShapeError(f"mask must be on {device}, beside q; got {mask.device}")
    fits = mask.dim() <= 4 and all(m in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits:
        hint = "; a mask of keys is (B, 1, 1, Nk)" if tuple(mask.shape) == (shape[0], shape[3]) else ""
        raise ShapeError(f"mask must broadcast to (B, Hq, Nq, Nk)={shape}; got {tuple(mask.shape)}{hint}")


def bool_mask(name: str, mask: Tensor, axes: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a mask that is not a bool tensor of this shape; an axis may be 1.

    It serves calls that no base class checks. A mask with fewer axes would broadcast along the wrong ones, so only a
    mask `(Nk,)`, which all queries share, may have fewer.

    Args:
        name: the argument's name.
        mask: the argument.
        axes: names of the axes, such as "B, 1, 1, Nk".
        shape: their sizes.
        device: the device of the call's tensors.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ShapeError(f"{name} must be bool ({axes})={shape}, True for what counts; got {shown(mask)}")
    if mask.device != device:
        raise ShapeError(f"{name} must be on {device}, beside the tokens; got {mask.device}")
    sizes = tuple(mask.shape)
    if mask.dim() in (1, len(shape)) and all(m in (1, s) for m, s in zip(sizes[::-1], shape[::-1], strict=False)):
        return
    is_of_keys = mask.dim() > 1 and (sizes[0], sizes[-1]) == (shape[0], shape[-1]) and set(sizes[1:-1]) <= {1}
    names = axes.split(", ")
    hint = f"; a mask of keys is ({', '.join([names[0], *['1'] * len(names[1:-1]), names[-1]])})" if is_of_keys else ""
    raise ShapeError(f"{name} must be bool ({axes})={shape}; got {sizes}{hint}")


def key_mask(mask: Tensor, batch: int, n_keys: int, device: torch.device) -> None:
    """Refuse a mask that is not of keys, bool `(B, 1, 1, Nk)`."""
    bool_mask("mask", mask, "B, 1, 1, Nk", (batch, 1, 1, n_keys), device)


#: The largest whole number of an option: sums of a few fit into int64, in which tensors count.
MOST = 2**53


def at_least(name: str, value: object, least: float) -> None:
    """Refuse an option under its least valid value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise OptionError(f"{name}={shown(value)} must be at least {least}")
    _not_larger(name, value)


def count(name: str, value: object, least: int = 0) -> None:
    """Refuse an option that is no whole number, or under its least valid value."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}={shown(value)} must be a whole number, at least {least}")
    _not_larger(name, value)


def _not_larger(name: str, value: float) -> None:
    """Refuse a whole number that no tensor can hold; a float may be inf."""
    if isinstance(value, int) and abs(value) > MOST:
        raise OptionError(f"{name}={shown(value)} must be at most 2**53")


def flag(name: str, value: object) -> None:
    """Refuse an option that is not True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={shown(value)} must be True or False")


def tensor(name: str, value: object) -> None:
    """Refuse what is not a tensor."""
    if not isinstance(value, Tensor):
        raise OptionError(f"{name}={value!r:.80} must be a tensor")


def between(name: str, value: object, low: float, high: float) -> None:
    """Refuse an option outside `[low, high]`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise OptionError(f"{name}={shown(value)} must be in {low}..{high}")


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is none of `choices`."""
    if value not in choices:
        raise OptionError(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}")


def scale(value: float | None, width: int) -> float:
    """Return the logits' scale: `width ** -0.5` unless the caller gives another."""
    if value is None:
        return width**-0.5
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"scale={shown(value)} must be a finite number or None (then D ** -0.5 = {width**-0.5:.4g})")
    return float(value)


class Kind(NamedTuple):
    """The valid values of an option: a test, and its description."""

    fits: Callable[[Any], bool]
    words: str


_KINDS: dict[object, Kind] = {
    int: Kind(lambda x: isinstance(x, int) and not isinstance(x, bool), "a whole number"),
    float: Kind(lambda x: isinstance(x, int | float) and not isinstance(x, bool), "a number"),
    bool: Kind(lambda x: isinstance(x, bool), "True or False"),
    torch.Generator: Kind(lambda x: isinstance(x, torch.Generator), "a torch.Generator"),
}


def options(cls: type, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Refuse, by name, an option that does not fit the constructor's annotation: `k=2.5`, `generator=0`.

    This checks whole numbers, numbers, booleans, generators and literals, each also with None. An unknown option is
    refused with the nearest known one. Python reports missing options, and the constructor checks ranges.
    """
    signature, kinds = _constructor(cls)
    for name in given:
        if name not in signature.parameters and not _takes_any(signature):
            known = [each for each in signature.parameters if each != "self"]
            near = nearest(name, known)
            hint = f'did you mean "{near}"?' if near else f"options: {', '.join(known) or 'none'}"
            raise OptionError(f'{cls.__name__} has no option "{name}"; {hint}')
    try:
        bound = signature.bind_partial(None, *args, **given).arguments
    except TypeError:
        return
    for name, value in bound.items():
        kind = kinds.get(name)
        if kind is not None and not kind.fits(value):
            raise OptionError(f"{name}={shown(value)} must be {kind.words}")


def _takes_any(signature: inspect.Signature) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())


def named(cls: type, args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor's call by name; {} if the call does not fit the constructor."""
    try:
        bound = _constructor(cls)[0].bind_partial(None, *args, **given)
    except TypeError:
        return {}
    found = dict(bound.arguments)
    found.pop(next(iter(_constructor(cls)[0].parameters)), None)
    for parameter in _constructor(cls)[0].parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(found.pop(parameter.name, {}))
    return found


@cache
def _constructor(cls: type) -> tuple[inspect.Signature, dict[str, Kind]]:
    init = cls.__init__  # type: ignore[misc]  # mypy refuses it, since a subclass may have another one; `cls` is exact
    try:
        hints = get_type_hints(init)
    except NameError:  # an annotation that only a type checker can read
        hints = {}
    kinds = {name: _kind(annotation) for name, annotation in hints.items()}
    return inspect.signature(init), {name: kind for name, kind in kinds.items() if kind is not None}


def _kind(annotation: Any) -> Kind | None:
    if get_origin(annotation) is Literal:
        words = get_args(annotation)
        return Kind(lambda x: isinstance(x, str | int | None) and x in words, "one of " + ", ".join(map(repr, words)))
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [each for each in get_args(annotation) if each is not type(None)]
        kind = _kind(inner[0]) if len(inner) == 1 and len(inner) < len(get_args(annotation)) else None
        return None if kind is None else Kind(lambda x: x is None or kind.fits(x), f"{kind.words} or None")
    return _KINDS.get(annotation) if isinstance(annotation, type) else None
