"""Q-Filters: one direction of each head's queries, found once, says which keys will be attended to.

Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression (2025), arXiv 2503.02812.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.host import Host, Method
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.probing import Progress, read
from foveate.host.site import Site
from foveate.kv.base.policy import calibration_items
from foveate.kv.base.scored import ScorePolicy

#: Texts that are read in a calibration.
_TEXTS = 8


@final
@dataclass(eq=False)
class QFilters(ScorePolicy):
    """A token's score is the product of its key and its head's filter, the main direction of the head's queries.

    Queries of a head spread little around one direction. A key's part along it is, up to a factor, its average logit,
    whatever the query. The filter is the first right singular vector of the head's queries, on the side where they lie,
    averaged over the query heads of a key/value head. Cost: one product of each key with one vector. The wrong choice
    for heads whose queries have no common direction, and where a question says what matters.

    Queries are taken as attention gets them, after the rotary embedding. The filters that the authors publish have the
    opposite sign: kvpress ranks by minus the product.

    Args:
        filters: the filters `(layers, Hkv, D)`, by `QFilters.calibrate`; zero for heads that do not exist.
        share, sink, recent, heads, safeguard, threshold, limit, every, layers: see `ScorePolicy`. The paper keeps no
            sinks by rule.
    """

    sink: int = 0
    filters: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0), repr=False)
    _rows: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.tensor("filters", self.filters)

    def bind(self, host: Host) -> None:
        super().bind(host)
        found = layout(host)
        expected = len(found), max(layer.kv_heads for layer in found.layers)
        if not self.filters.numel():
            raise OptionError("QFilters needs filters= of this model: QFilters.calibrate")
        if tuple(self.filters.shape[:2]) != expected:
            raise ShapeError(
                f"filters must begin with (layers, key/value heads)={expected} for this model; got "
                f"{tuple(self.filters.shape)}"
            )
        self._rows = {one.layer: row for row, one in enumerate(found.layers)}

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        heads = site.positions.shape[1]
        k = site.k.float().unflatten(1, (heads, -1)).mean(2)
        return torch.einsum("bhsd,hd->bhs", k, self.filters[self._rows[site.layer], :heads, : k.shape[3]].to(k))

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Find the main direction of each head's queries on eight texts."""
        probe, found = _Probe(), layout(host)
        for step, (ids, _) in enumerate(calibration_items(data, _TEXTS)):
            read(host, ids, probe)
            if progress is not None:
                progress(step + 1, _TEXTS, "directions of the queries")
        width = max(total.shape[1] for total, _ in probe.sums.values())
        filters = torch.zeros(len(found), max(layer.kv_heads for layer in found.layers), width)
        for row, one in enumerate(found.layers):
            total, products = probe.sums[one.layer]
            # the eigenvectors of Q'Q are the right singular vectors of Q
            main = torch.linalg.eigh(products).eigenvectors[..., -1]
            main = main * torch.where((main * total).sum(-1, keepdim=True) < 0, -1.0, 1.0)
            filters[row, : one.kv_heads, : main.shape[1]] = main.unflatten(0, (one.kv_heads, -1)).mean(1).float()
        return {"filters": filters}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`."""
        return replace(super().at_budget(budget, host, length), filters=learnt["filters"])


class _Probe(Method):
    """A method that adds up each head's queries, and the products of their channels."""

    def __init__(self) -> None:
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal

    def read(self, site: Site, out: Tensor) -> None:
        q, found = site.q.double(), tokens(site)
        if found is not None:
            q = q * found.real[:, None, -q.shape[2] :, None]
        total, products = q.sum((0, 2)).cpu(), torch.einsum("bhnd,bhne->hde", q, q).cpu()
        before = self.sums.get(site.layer)
        self.sums[site.layer] = (total, products) if before is None else (before[0] + total, before[1] + products)
