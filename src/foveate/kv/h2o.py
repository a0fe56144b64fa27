"""H2O: tokens that have received most attention so far are kept, beside the newest.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (2023), arXiv 2306.14048.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.host.received import received_mass
from foveate.host.site import Site
from foveate.kv.base.scored import UNEVEN, ScorePolicy, own_positions
from foveate.kv.parts import slot_notes
from foveate.kv.parts.window_queries import per_kv_head


@final
@dataclass(eq=False)
class H2O(ScorePolicy):
    """A token's score is the sum of the attention weights that all queries so far have paid to it.

    The newest tokens take half of a head's budget. Cost: two more attentions for a prompt, in linear memory; one more
    row of weights for each token; a sum and a position of 4 bytes each for each token that is stored. The wrong choice
    where a token matters late that nobody looked at before, and for a single long prompt: early tokens are seen by more
    queries, and have larger sums.

    The paper's cache has one size in tokens. Here the budget is the same share of all tokens so far, as in the release
    for a prompt; a prompt in several pieces sums what each piece still sees. In assisted generation, drafts that the
    model refuses have been counted as queries.

    Args:
        newest: share of a head's budget for the newest tokens. With a `threshold` there is no budget, and `recent`
            says how many of them stay.
        every: while decoding, compress again after that many new tokens; None for never.
        variant: "paper", or "kvpress": the mean over the queries that could see the token, and no newest tokens;
            kvpress compresses once after the prompt (`every=None`).
        share, sink, recent, heads, safeguard, layers: see `ScorePolicy`. The paper keeps no sinks by rule.

    Query heads of a key/value head are added; the paper's models have one for each.
    """

    sink: int = 0
    every: int | None = 1
    newest: float = 0.5
    variant: Literal["paper", "kvpress"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.between("newest", self.newest, 0.0, 1.0)
        validate.one_of("variant", self.variant, ("paper", "kvpress"))

    def read(self, site: Site, out: Tensor) -> None:
        slot_notes.add(site.notes(self), site, per_kv_head(received_mass(site), site, "sum"))

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        sums = slot_notes.find(site.notes(self), site)
        own, count = own_positions(site)
        if self.variant == "kvpress":
            return sums / (count[:, None, None] - own).clamp_min(1)
        if self.threshold is not None:
            return sums
        newest = (count * self.layer_share(site)).round() * self.newest
        return sums.masked_fill(own >= (count - newest.long())[:, None, None], torch.inf)

    def note_kept(self, site: Site, kept: Bool[Tensor, "b hkv s"]) -> None:
        if self.heads == "equal" and self.threshold is None and (UNEVEN, site.layer) not in site.step:
            most = round(site.seen * self.layer_share(site)) + 1  # known without a question to the device
        else:
            most = int(kept.sum(-1).max())
        slot_notes.trim(site.notes(self), site, kept, most)
