"""StreamingLLM: sinks and a recent window, with the positions within the cache: text of any length.

Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host import Ends, Host
from foveate.host.fused_statistics import has_kernel
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base.policy import Policy
from foveate.kv.renumbered import Renumbered
from foveate.kv.sink_recent import SinkRecent


@final
@dataclass(eq=False)
class StreamingLLM(Policy):
    """Every head keeps the first `sink` and the last `recent` tokens, and distances are counted over what is kept.

    This is `SinkRecent` and `Renumbered` in one. No distance is longer than `sink + recent` and a call's tokens. So a
    text may be longer than the model's trained length: read it in pieces (`foveate.Context(..., chunk=)`) that
    fit beside the kept tokens. Memory and time per token are constant; a call of several tokens, or with padding,
    copies the kept keys to rotate them. What lies between the sinks and the window is lost: the wrong choice for
    retrieval. Where text fits the trained length, `SinkRecent` alone is faster.

    Args:
        sink: first tokens kept (the paper's 4).
        recent: last tokens kept.

    Models whose keys do not rotate by fixed angles are refused, as are those that compute keys from their cache.
    """

    sink: int = 4
    recent: int = 256
    evicts: ClassVar[bool] = True
    _window: SinkRecent = field(default_factory=SinkRecent, init=False, repr=False)
    _positions: Renumbered = field(default_factory=Renumbered, init=False, repr=False)

    def __post_init__(self) -> None:
        self._window = SinkRecent(self.sink, self.recent)

    def bind(self, host: Host) -> None:
        super().bind(host)
        self._positions.bind(host)
        context = getattr(host.config, "max_position_embeddings", None)
        if context is not None and self.sink + self.recent > context:
            raise OptionError(
                f"sink + recent = {self.sink + self.recent} does not fit in the {context} positions that "
                f"{type(host.model).__name__} was trained on"
            )

    def keep(self, site: Site) -> Tensor | Ends | None:
        return self._window.keep(site)

    def attend(self, site: Site) -> Tensor | None:
        if not self._positions.at(site):
            return None
        gap = self._gap(site)
        return self._positions.attend(site) if gap is None else self._positions.attend_over_gap(site, self.sink, gap)

    def _gap(self, site: Site) -> int | None:
        """Return how many tokens were dropped behind the sinks; None unless a single query sees every slot.

        A layer that holds one token more than it keeps has its only gap there, since no other method dropped any.
        """
        if site.slots is None or site.slots.store is None or site.slots.window is not None:
            return None
        held = site.slots.store.groups[0].length
        plain = site.softcap is None and not site.is_biased and not site.dropout and site.hidden_keys is None
        one = site.q.shape[2] == 1 and tokens(site) is None and site.slots.store.holds(held) and self.sink > 0
        kernel = site.q.dtype in (torch.float32, torch.float64) and has_kernel(site.q)
        usual = held == self.sink + self.recent + 1
        return site.seen - held if plain and one and kernel and usual else None

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        made = SinkRecent.at_budget(budget, host, length)
        return cls(made.sink, made.recent)
