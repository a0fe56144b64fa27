"""Quest: each decoding query reads the pages whose bound is largest, by the extremes of their keys.

Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (2024), arXiv 2406.10774. As in the release's
kernels, the newest page is one of the `pages`, and is always read. The release's evaluation code ranks it like the
others, and reads three pages at least.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import UnsupportedModel
from foveate.core.masks import NEG_INF
from foveate.core.selection import Indices, Selection
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget
from foveate.kv.parts.head_split import check_reach, far_layers
from foveate.kv.parts.last_query import has_everything, visible
from foveate.kv.parts.page_bounds import add_own_pages, add_pages, page_bounds


@final
@dataclass(eq=False)
class Quest(Policy):
    """While decoding, a query reads the newest page and the pages that could hold its largest logits.

    A page is `page` neighbouring tokens. For each channel it has the minimum m and the maximum M of its keys, so that
    `sum_c max(q_c m_c, q_c M_c)` bounds every logit in it. A step reads one minimum and one maximum for each page and
    the tokens of `pages` pages, never all keys: `1 / page` of the cache and `pages * page` tokens. The table takes that
    same `1 / page` of memory. Nothing is evicted and prefill is dense. Needs no calibration. The wrong choice if memory
    is the limit, or if the tokens that matter are scattered: each costs a page. Layers with a window of their own, or
    from which another method evicts, read all that they hold. A model's bias by position is not part of the bound.

    Args:
        pages: pages that a query reads, the newest one included; the paper reads 256 to 4096 tokens.
        page: tokens in a page.
        dense_layers: first layers that read everything, of those that attend to all tokens; two in the release.
        per: the owner of a choice: each query "head", as in the release, or each "group" of heads of one key/value
            head, which then reads each key once.
        reduce: how the bounds of the heads of a group are combined, "max" or "mean".
    """

    pages: int = 64
    page: int = 16
    dense_layers: int = 2
    per: Literal["head", "group"] = "head"
    reduce: Literal["max", "mean"] = "max"
    in_place: ClassVar[bool] = True
    _order: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("pages", 1), ("page", 1), ("dense_layers", 0)):
            validate.count(name, getattr(self, name), least)
        validate.one_of("per", self.per, ("head", "group"))
        validate.one_of("reduce", self.reduce, ("max", "mean"))

    @property
    def tables(self) -> float:
        """See `Policy.tables`."""
        return 1 / self.page

    def bind(self, host: Host) -> None:
        far = far_layers(layout(host))
        check_reach("pages: quest", self.pages * self.page, host)
        if len(far) <= self.dense_layers:
            raise UnsupportedModel(
                f"dense_layers={self.dense_layers}: {type(host.model).__name__} has {len(far)} layers that attend to "
                f"all tokens, so that quest would change nothing"
            )
        self._order = {layer.layer: order for order, layer in enumerate(far)}

    def at(self, site: Site) -> bool:
        return self._order.get(site.layer, -1) >= self.dense_layers and has_everything(site)

    def select(self, site: Site) -> Selection | None:
        found, page, total = tokens(site), self.page, site.k.shape[2]
        new, newest = site.q.shape[2], (total - 1) // page  # the number of the newest page, if none is padding
        notes = site.notes(self)
        if found is None:
            table = add_pages(notes, site.k, page, total - new)
        else:
            before = found.before(total - new)
            table = add_own_pages(
                notes, site.k, page, before, found.count, new, lambda own: found.at(own[:, 0])[:, None]
            )
        if site.phase != "decode" or newest < self.pages:
            return None
        bounds = self._bounds(site, table[:, :, :newest])
        inside = torch.arange(page, device=site.k.device)
        if found is None:
            chosen = bounds.topk(self.pages - 1).indices
            near = torch.arange(newest * page, total, device=site.k.device).expand(*chosen.shape[:2], -1)
            index = torch.cat([(chosen[..., None] * page + inside).flatten(2), near], -1)
            return Indices(index[:, :, None], 1, total)
        last = ((found.count.long() - 1) // page)[:, None, None]
        bounds = bounds.masked_fill(torch.arange(newest, device=site.k.device) >= last, NEG_INF)
        chosen = bounds.topk(self.pages - 1).indices
        chosen = torch.cat([chosen.where(chosen < last, -1), last.expand(-1, chosen.shape[1], -1)], -1)
        own = (chosen[..., None] * page + inside).flatten(2)
        valid = (own >= 0) & (own < found.count[:, None, None])
        index = found.at(own.flatten(1)).view_as(own)
        return Indices(index[:, :, None], 1, total, valid[:, :, None])

    def _bounds(self, site: Site, table: Float[Tensor, "b hkv p e"]) -> Float[Tensor, "b h p"]:
        """Return the bound of each page, for each owner of a choice."""
        bounds = page_bounds(site.q[:, :, -1].unflatten(1, (site.k.shape[1], -1)), table).float()
        if self.per == "head":
            bounds = bounds.flatten(1, 2)
        else:
            bounds = bounds.amax(2) if self.reduce == "max" else bounds.mean(2)
        seen = None if site.is_plain_causal or tokens(site) is not None else visible(site)
        if seen is None:
            return bounds
        some = seen[:, : table.shape[2] * self.page].unflatten(1, (table.shape[2], self.page)).any(-1)
        return bounds.masked_fill(~some[:, None], NEG_INF)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Dense layers take at most half of the budget, and a quarter of the layers.

        A layer reads four pages at least, whose size shrinks with a budget under 64 tokens. As in the paper, the table
        of pages does not count.
        """
        check_budget(budget, length)
        layers = len(far_layers(layout(host)))
        dense = min(2, layers // 4, int(budget * layers / 2))
        total = cls.tokens(max(0.0, budget * layers - dense) / (layers - dense), length)
        page = min(16, -(-total // 4))
        return cls(-(-total // page) if budget == 1 else max(1, round(total / page)), page, dense)
