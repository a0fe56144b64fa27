"""Chosen heads of a model, in the forms that callers have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.host.hf.model import Host

#: Chosen heads: a bool table `(layers, heads)`, pairs `(layer, head)`, or `{layer: heads}`; None for the default.
Heads = Tensor | Iterable[tuple[int, int]] | Mapping[int, Iterable[int]] | None


def checked_heads(heads: Heads) -> Heads:
    """Return chosen heads in a form that can be read more than once, and refuse what is no choice of heads."""
    if isinstance(heads, Tensor | Mapping | None):
        return heads
    if not isinstance(heads, Iterable) or isinstance(heads, str):
        raise OptionError(
            f"heads must be a table (layers, heads), pairs (layer, head), a mapping or None; got {described(heads)}"
        )
    return tuple(heads)


def head_table(heads: Heads, host: Host) -> Bool[Tensor, "l h"]:
    """Convert chosen heads of a model from any form to a table; None is all heads."""
    shape = (host.layers, host.heads)
    if isinstance(heads, Tensor):
        if heads.dtype != torch.bool or tuple(heads.shape) != shape:
            raise ShapeError(
                f"heads must be a bool table (layers, heads)={shape} for this model; got {described(heads)}"
            )
        return heads.cpu()
    if heads is None:
        return torch.ones(shape, dtype=torch.bool)
    table = torch.zeros(shape, dtype=torch.bool)
    by_layer = heads.items() if isinstance(heads, Mapping) else ((layer, (head,)) for layer, head in heads)
    for layer, head in ((layer, head) for layer, some in by_layer for head in some):
        if layer not in range(shape[0]) or head not in range(shape[1]):
            raise OptionError(f"heads: ({layer}, {head}) must be in (0..{shape[0] - 1}, 0..{shape[1] - 1})")
        table[layer, head] = True
    return table


def described(x: object) -> str:
    """Return a value for a message: a tensor as its dtype and shape, anything else as its type."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
