"""Overlap of the choices of layers: the share of their keys with the largest logits that both have."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import masks, validate
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.method import Method
from foveate.host.probing import logits_of, read
from foveate.host.site import Site
from foveate.kv.parts.head_split import far_layers


@torch.no_grad()
def topk_overlap(
    model: object, ids: Int[Tensor, "b n"], k: int, queries: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "l l"]:
    """Measure how much the choices of layers overlap: the mean share of their `k` largest logits' keys in common.

    Heads are compared one by one, in the layers that attend to all tokens; see `TidalDecode`.

    Args:
        model: a decoder.
        ids: text without padding.
        k: keys in a set.
        queries: the queries whose choices are compared; None is the last token.
    """
    here = host(model)
    validate.at_least("k", k, 1)
    if queries is None:
        queries = torch.zeros_like(ids, dtype=torch.bool)
        queries[:, -1] = True
    sets = _Sets(k, queries, [layer.layer for layer in far_layers(layout(here))])
    read(here, ids, sets)
    chosen = torch.stack([sets.found[layer] for layer in sets.layers]).double()
    return torch.einsum("lrs,mrs->lmr", chosen, chosen).div(chosen[0].sum(-1)).mean(-1).float()


class _Sets(Method):
    """A method that reads the keys with the largest logits of some queries: `(rows, S)` per layer."""

    def __init__(self, k: int, queries: Tensor, layers: list[int]) -> None:
        self.k, self.layers = k, layers
        self.rows = [row.nonzero()[:, 0] for row in queries.cpu()]
        self.found: dict[int, Tensor] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal and site.layer in self.layers

    def read(self, site: Site, out: Tensor) -> None:
        parts = [self._sets(site, batch, rows) for batch, rows in enumerate(self.rows) if rows.numel()]
        self.found[site.layer] = torch.cat(parts).cpu()

    def _sets(self, site: Site, batch: int, rows: Tensor) -> Bool[Tensor, "rh s"]:
        logits = logits_of(site, rows.to(site.q.device), batch)[0].transpose(0, 1)
        best = logits.topk(min(self.k, logits.shape[-1]))
        sets = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, best.indices, best.values > masks.NEG_INF)
        return sets.flatten(0, 1)
