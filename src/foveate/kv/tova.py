"""TOVA: the tokens that the last query attends to are kept, the same for all heads of a layer.

Transformers are Multi-State RNNs (2024), arXiv 2401.06104.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy
from foveate.kv.parts.window_queries import LastQueries, window_weights


@final
@dataclass(eq=False)
class TOVA(ScorePolicy):
    """A token's score is the attention of the last query, averaged over all query heads of a layer.

    Cost: one row of the attention matrix in each layer. All heads of a layer keep the same tokens. The paper drops one
    token at each step (`every=1`); the default compresses once after the prompt, as kvpress does. The wrong choice
    where heads look for different things.

    Args:
        share, sink, recent, heads, safeguard, every, layers: see `ScorePolicy`. The newest token always stays; the
            paper keeps no sinks by rule.
    """

    sink: int = 0
    recent: int = 1

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        weights = window_weights(site, LastQueries.of(site, 1))
        return weights[:, :, 0].mean(1, keepdim=True).expand(site.positions.shape)
