"""PyramidKV: SnapKV with more tokens for the lower layers, which attend broadly, than for the upper ones.

PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (2024), arXiv 2406.02069.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self, final

from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy
from foveate.kv.snapkv import SnapKV


@final
@dataclass(eq=False)
class PyramidKV(ScorePolicy):
    """SnapKV's scores, with a budget that falls linearly from the first layer to the last.

    The mean over the layers is `share`. Before anything is capped, the last layer has a `beta`-th of the mean and the
    first as much above the mean as the last is below it. No layer has more than all tokens; the last then has the
    rest. Cost: that of SnapKV. The wrong choice where upper layers retrieve from far away and lower ones only look
    around; SnapKV gives them the same. Layers with a window keep `share` and are no part of the pyramid.

    Args:
        recent, pool, pooling, group: see `SnapKV`.
        beta: ratio of the mean to the smallest layer budget (the paper's 20); 1 is SnapKV.
        even: share of each layer's budget that is not in the pyramid, but the same for all layers. In the paper that
            is the window, `recent / (share · length)`; `at_budget` sets it so. kvpress counts the window within the
            pyramid, which is 0, and takes equal budgets where the smallest does not hold the window.
        share, sink, heads, safeguard, every, layers: see `ScorePolicy`.
    """

    sink: int = 0
    recent: int = 64
    pool: int = 5
    pooling: Literal["mean", "max"] = "mean"
    group: Literal["mean", "max", "sum"] = "mean"
    beta: float = 20.0
    even: float = 0.0
    _order: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.at_least("beta", self.beta, 1.0)
        validate.between("even", self.even, 0.0, 1.0)
        self._snapkv()

    def bind(self, host: Host) -> None:
        super().bind(host)
        far = [one.layer for one in layout(host).layers if one.window is None]
        far = [layer for layer in far if self.layers is None or layer in self.layers]
        self._order = {layer: number for number, layer in enumerate(far)}

    def layer_share(self, site: Site) -> float:
        count = len(self._order)
        if site.layer not in self._order or count == 1:
            return self.share
        last = self.share * (self.even + (1.0 - self.even) / self.beta)
        first = min(1.0, 2.0 * self.share - last)
        last = 2.0 * self.share - first
        return first - self._order[site.layer] * (first - last) / (count - 1)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        return self._snapkv().score(site)

    def _snapkv(self) -> SnapKV:
        return SnapKV(recent=self.recent, pool=self.pool, pooling=self.pooling, group=self.group)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The window takes half the budget at most; it is the even part, as in the paper."""
        made = super().at_budget(budget, host, length, **learnt)
        total = cls.tokens(budget, length)
        made.recent = max(1, min(made.recent, total // 2))
        made.even = min(1.0, made.recent / total)
        return made
