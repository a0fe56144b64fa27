"""TidalDecode: a few layers choose the tokens of a decoding step, and the others read only these.

TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (2024), arXiv 2410.05076. The
optional cache correction, which reads recent tokens again with full attention, is left out: it is a second forward pass
of the model, which a method cannot start inside an attention call. The release uses one re-selection layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.core.selection import Indices, Selection
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.method import Method
from foveate.host.probing import Progress, logits_of, read
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, calibration_items, check_budget
from foveate.kv.parts.head_split import check_reach, far_layers
from foveate.kv.parts.last_query import has_everything, last_logits

Per = Literal["head", "group", "layer"]


@final
@dataclass(eq=False)
class TidalDecode(Policy):
    """While decoding, a few layers read everything and choose `top_k` tokens; the layers after them read only these.

    Nothing is evicted and prefill is dense. A step makes `dense_layers + 1 + len(reselect_layers)` full reads instead
    of one per layer. The set is used for one step. The wrong choice for shallow models, whose full reads are most of
    the work, and with a re-selection layer whose choice does not suit the later layers: `calibrate` measures which one
    suits them. Layers with a window of their own, or from which another method evicts, read all that they hold. Layer
    numbers count only the layers that attend to all tokens (if there are none, those with the widest window), and skip
    a hybrid model's other layers.

    Args:
        top_k: tokens that a sparse layer reads.
        dense_layers: number of layers before the first selection, which read everything; the next layer selects.
        reselect_layers: further layers that read everything and select again.
        per: the owner of a set: each query "head", each "group" of heads of one key/value head (each key is then read
            once for the group), or the "layer".
        reduce: how the heads of a group or a layer are combined: by the largest logit ("max"), or by their "sum".
    """

    top_k: int = 256
    dense_layers: int = 2
    reselect_layers: tuple[int, ...] = (13,)
    per: Per = "group"
    reduce: Literal["max", "sum"] = "max"
    in_place: ClassVar[bool] = True
    _order: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        validate.count("top_k", self.top_k, 1)
        validate.count("dense_layers", self.dense_layers)
        validate.one_of("per", self.per, ("head", "group", "layer"))
        validate.one_of("reduce", self.reduce, ("max", "sum"))
        if not isinstance(self.reselect_layers, tuple | list):
            raise OptionError(f"reselect_layers={shown(self.reselect_layers)} must be a tuple of layer numbers")
        for layer in self.reselect_layers:
            validate.count("reselect_layers", layer)

    def bind(self, host: Host) -> None:
        far = far_layers(layout(host))
        if len(far) < 2:
            raise UnsupportedModel(
                f"tidal_decode needs two layers that attend to all tokens, one to select and one to read; "
                f"{type(host.model).__name__} has {len(far)}"
            )
        check_reach("top_k: tidal_decode", self.top_k, host)
        for layer in self.reselect_layers:
            if layer >= len(far):
                raise OptionError(
                    f"reselect_layers={self.reselect_layers} must be under the {len(far)} layers of this model that "
                    f"attend to all tokens"
                )
        self._order = {layer.layer: order for order, layer in enumerate(far)}

    def at(self, site: Site) -> bool:
        if site.phase != "decode" or self._order.get(site.layer, -1) < self.dense_layers:
            return False
        return has_everything(site)

    def select(self, site: Site) -> Selection | None:
        if site.k.shape[2] <= self.top_k:
            return None
        order = self._order[site.layer]
        if order == self.dense_layers or order in self.reselect_layers:
            site.step[id(self)] = self._choose(site)
            return None
        if id(self) not in site.step:
            return None
        return Indices(site.step[id(self)].to(site.q.device), 1, site.k.shape[2])

    def _choose(self, site: Site) -> Int[Tensor, "b h 1 k"]:
        logits = last_logits(site)
        if self.per != "head":
            groups = logits.unflatten(1, (site.k.shape[1] if self.per == "group" else 1, -1))
            logits = groups.amax(2) if self.reduce == "max" else groups.sum(2)
        return logits.topk(self.top_k).indices[:, :, None]

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Measure how much the layers' choices overlap on one example. `at_budget` places the re-selection by it."""
        ((ids, answers),) = calibration_items(data, 1)
        overlap = topk_overlap(host.model, ids, max(1, ids.shape[1] // 16), answers)
        if progress is not None:
            progress(1, 1, "overlap of the layers' choices")
        return {"overlap": overlap}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. There is one re-selection, and min(2, a quarter of the layers) dense layers.

        The re-selection layer is the one whose choice agrees best with those of the later layers (and the first
        selection with those of the layers before it), if `calibrate` has measured this. Otherwise it is the layer at
        13/32 of the depth. `top_k` uses the budget that the full reads leave. If they leave none, the model is too
        shallow for the budget: sparse layers then read the budget's share, and the whole model reads more.
        """
        return cls(*split_budget(budget, len(far_layers(layout(host))), length, learnt.get("overlap")))


def split_budget(budget: float, layers: int, length: int, overlap: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """Split a budget for some layers into `(top_k, dense_layers, reselect_layers)`; see `TidalDecode.at_budget`."""
    check_budget(budget, length)
    if overlap is not None and tuple(overlap.shape) != (layers, layers):
        raise ShapeError(f"overlap must be ({layers}, {layers}) for this model; got {tuple(overlap.shape)}")
    dense = min(2, layers // 4)
    again: tuple[int, ...] = ()
    # the last layer may reselect for itself alone, unless there are three layers or fewer
    later = range(dense + 1, layers if layers > 3 else layers - 1)
    if later:
        middle = min(max(round(layers * 13 / 32), later[0]), later[-1])
        again = (middle if overlap is None else _best_layer(overlap, dense, later),)
    full = dense + 1 + len(again)
    left = (budget * layers - full) / max(1, layers - full)
    return Policy.tokens(left if left > 0 else budget, length), dense, again


def _best_layer(overlap: Float[Tensor, "l l"], first: int, later: range) -> int:
    """Return the re-selection layer for which the sparse layers agree best with the selection that they would read."""
    worth = {r: overlap[first, first + 1 : r].sum() + overlap[r, r + 1 :].sum() for r in later}
    return max(worth, key=lambda layer: float(worth[layer]))


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
