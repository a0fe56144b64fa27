"""KNorm: keys of small norm are kept.

A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (2024), arXiv 2406.11430.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy


@final
@dataclass(eq=False)
class KNorm(ScorePolicy):
    """A token's score is minus the norm of its key, which in trained models goes with the attention that it receives.

    Cost: one norm for each key, no query and no attention weights. The wrong choice where a layer does not show that
    correlation; the paper leaves the first layers whole, as `layers` may do here. The lab model does not show it: its
    large keys get more attention.

    Args:
        share, sink, recent, heads, safeguard, every, layers: see `ScorePolicy`. The paper keeps no sinks by rule; sinks
            have small keys.
    """

    sink: int = 0

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        return -site.k.float().norm(dim=-1)
