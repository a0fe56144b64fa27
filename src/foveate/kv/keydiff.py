"""KeyDiff: keys that point away from the others are kept.

KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments
(2025), arXiv 2504.15364.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions


@final
@dataclass(eq=False)
class KeyDiff(ScorePolicy):
    """A token's score is minus the cosine between its key and the mean of all keys' directions.

    Cost: O(S D) for each head, no query and no attention weights, so that it also serves a prompt that is read in
    pieces (the paper's setting: blocks of 128). The wrong choice where a question is at hand that says what matters.

    Args:
        share, sink, recent, heads, safeguard, every, layers: see `ScorePolicy`. The paper keeps no sinks by rule.
    """

    sink: int = 0

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        own, _ = own_positions(site)
        directions = F.normalize(site.k.float(), dim=-1)
        anchor = directions.masked_fill((own < 0)[..., None], 0.0).sum(2, keepdim=True)
        return -F.cosine_similarity(site.k.float(), anchor, dim=-1)
