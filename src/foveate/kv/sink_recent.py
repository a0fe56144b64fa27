"""Attention sinks and a recent window: the baseline of cache policies.

Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

from torch import Tensor

from foveate.core import validate
from foveate.host.hf.model import Host
from foveate.host.site import Site
from foveate.host.slots.ends import Ends
from foveate.kv.base.policy import Policy
from foveate.kv.parts.head_split import keep_ends


@final
@dataclass(eq=False)
class SinkRecent(Policy):
    """Every head keeps the first `sink` and the last `recent` tokens; the others are evicted.

    Memory and time per token are constant. The prompt is read densely, in one or several pieces. Keys keep their
    original positions (the paper renumbers them, as `Renumbered` does; within the trained length this changes little).
    All tokens between the sinks and the window are lost: the wrong choice for retrieval.

    Args:
        sink: first tokens kept (the paper's 4).
        recent: last tokens kept.
    """

    sink: int = 4
    recent: int = 256
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.count("sink", self.sink, 0)
        validate.count("recent", self.recent, 1)

    def keep(self, site: Site) -> Tensor | Ends | None:
        if site.seen <= self.sink + self.recent:
            return None
        return keep_ends(site, self.sink, self.recent)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        total = cls.tokens(budget, length)
        return cls(sink=min(4, total - 1), recent=total - min(4, total - 1))
