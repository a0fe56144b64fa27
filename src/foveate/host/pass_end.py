"""The end of a forward pass, as methods get it: the calls of all layers together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from foveate.host.site import Site

#: `reread(ids, real, reader)`; see `PassEnd.reread`.
Reread = Callable[[Int[Tensor, "b n"], Bool[Tensor, "b n"], Any], None]


@dataclass(frozen=True, eq=False)
class PassEnd:
    """The end of a forward pass.

    Args:
        sites: the calls of the layers at which the method may drop tokens, in their order. They are as of the end of
            the tokens that will stay. Their queries, keys, values and hidden states are released and read as NaN.
            Positions, masks and notes are there.
        ids: the tokens that the pass read and that will stay, `(B, N)`. None if the model was given embeddings or
            pictures.
        reread: `reread(ids, real, reader)` lets the model read more tokens `(B, N)` after its cache, with the method
            `reader` alone, and removes them again. Tokens that are not `real` count as padding.
        shared: what methods tell those behind them at the same end, such as where a measurement stands that several
            need.
    """

    sites: list[Site]
    ids: Int[Tensor, "b n"] | None
    reread: Reread
    shared: dict[object, object] = field(default_factory=dict)
