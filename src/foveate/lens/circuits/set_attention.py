"""Attention that is set: some heads attend from one token to given ones, whatever they would have done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.circuits.interventions import Head, checked_heads


@final
@dataclass(eq=False)
class SetAttention(Method):
    """Overwrite one row of attention weights of some heads; the rest of the forward pass takes its course.

    In the repair of Circuit Component Reuse (2023, arXiv 2310.08744), inhibition heads attend from the last token of
    the prompt to the distractors alone, in equal shares. Only the reading of a prompt is changed, not later tokens.

    Args:
        heads: the heads.
        keys: positions of the tokens that they attend to, `(k,)` for all texts or `(B, k)` for each.
        weights: the weights of the keys, in the same form, with sum 1; None is equal shares.
        query: the position of the row; negative ones count from the end of the call.
    """

    heads: Iterable[Head]
    keys: Int[Tensor, "*b k"]
    weights: Float[Tensor, "*b k"] | None = None
    query: int = -1

    def __post_init__(self) -> None:
        self.heads = tuple(checked_heads(self.heads))
        if not isinstance(self.keys, Tensor) or self.keys.dtype != torch.long or self.keys.ndim not in (1, 2):
            raise ShapeError(f"keys must be positions, (k,) or (B, k); got {shown(self.keys)}")
        if self.weights is None:
            self.weights = torch.full(self.keys.shape, 1 / self.keys.shape[-1])
        total = self.weights.sum(-1)
        if self.weights.shape[-1] != self.keys.shape[-1] or not torch.allclose(
            total, torch.ones_like(total), atol=1e-4
        ):
            raise ShapeError(f"weights must be one for each key, with sum 1; got {shown(self.weights)}")

    def bind(self, host: Host) -> None:
        host.check_heads(self.heads)

    def at(self, site: Site) -> bool:
        return site.phase == "prefill" and any(layer == site.layer for layer, _ in self.heads)

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        assert self.weights is not None
        at = self.query + site.seen if self.query < 0 else self.query
        row = at - int(site.query_positions[0])
        if not 0 <= row < weights.shape[2]:
            return weights
        batch = weights.shape[0]
        keys = self.keys.to(weights.device).expand(batch, -1)
        if int(keys.max()) > at or int(keys.min()) < 0:
            raise OptionError(f"keys must be positions in 0..{at}, which the query at {at} may see")
        new = weights.new_zeros(batch, weights.shape[3]).scatter_add(
            1, keys, self.weights.to(weights).expand(batch, -1)
        )
        changed = weights.clone()
        for layer, head in self.heads:
            if layer == site.layer:
                changed[:, head, row] = new
        return changed
