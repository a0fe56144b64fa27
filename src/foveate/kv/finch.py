"""Finch: the question says which tokens stay, and their keys move together.

FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models (2024), Transactions of the ACL 12,
arXiv 2408.00167. The authors' code is giulio98/context-compression.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import UnsupportedModel
from foveate.host import Host, Slots
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions
from foveate.kv.parts.window_queries import LastQueries, per_kv_head, visible_slots, window_weights
from foveate.kv.renumbered import Rotation, rotations


@final
@dataclass(eq=False)
class Finch(ScorePolicy):
    """A token's score is the attention that the question's tokens pay to it, added up over them and a layer's heads.

    With `Context.read(text, question=...)` the question follows the text, and each of its pieces, and is removed again;
    only tokens of the text are then kept. Without it, a prompt's last `recent` tokens are taken for the question, and
    stay. The keys that stay are rotated to positions without gaps, right before the next token, so that distances are
    those within the cache. Cost: a row of the attention matrix for each token of the question and each piece, and one
    rotation of what stays. The wrong choice for a text about which more than one question will be asked.

    Args:
        recent: tokens that are taken for the question where none is told.
        normalised: whether a query's weights are multiplied by the number of tokens that it sees, so that all queries
            count alike. The paper says so; its release computes it and then does not use it.
        together: whether all heads of a layer keep the same tokens, by the sum of their scores, as in the release;
            False for each key/value head its own, as in kvpress.
        renumbered: whether keys are rotated together.
        share, sink, heads, safeguard, every, layers: see `ScorePolicy`. The paper keeps no sinks by rule.

    A text in pieces (`Context(..., chunk=)`) is compressed after each piece to the share of what has been read so far,
    from what was kept and the piece, as in the release. Models whose keys do not rotate by fixed angles need
    `renumbered=False`.
    """

    sink: int = 0
    recent: int = 32
    normalised: bool = True
    together: bool = True
    renumbered: bool = True
    _rotations: dict[int, Rotation | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("recent", self.recent, 1)
        validate.flag("normalised", self.normalised)
        validate.flag("together", self.together)
        validate.flag("renumbered", self.renumbered)

    def bind(self, host: Host) -> None:
        super().bind(host)
        if self.renumbered:
            if layout(host).expands:
                raise UnsupportedModel(
                    f"{type(host.model).__name__} computes its keys from its cache at each call, so that their "
                    f"positions cannot change; use renumbered=False"
                )
            self._rotations = rotations(host)

    def stays(self, site: Site) -> Bool[Tensor, "b h s"]:
        if not _is_asked(site):
            return super().stays(site)
        own, _ = own_positions(site)
        sinks = (self.size(site) - 1).clamp_max(self.sink)
        return (own >= 0) & (own < sinks[:, None, None])

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        queries = LastQueries.of(site, site.tentative if _is_asked(site) else self.recent)
        weights = window_weights(site, queries)
        if self.normalised:
            seen = visible_slots(site, queries.at).sum(-1).to(weights.dtype)
            weights = weights * seen.repeat_interleave(weights.shape[1] // seen.shape[1], 1)[..., None]
        received = per_kv_head(weights.sum(2), site, "sum")
        return received.sum(1, keepdim=True).expand_as(received) if self.together else received

    def refit(self, site: Site, kept: Slots, dropped: Slots, heads: Tensor) -> Slots:
        rotation = self._rotations.get(site.layer)
        if rotation is None:
            return kept
        found = tokens(site)
        before, gone = ((x if found is None else found.own(x)) for x in (kept.positions, dropped.positions))
        return replace(kept, k=rotation(kept.k, gaps(before, gone)))


def _is_asked(site: Site) -> bool:
    """Return whether the call ends in a question that will be removed again."""
    return site.tentative > 0 and not site.drafts


def gaps(kept: Int[Tensor, "b h s"], dropped: Int[Tensor, "b h n"]) -> Int[Tensor, "b h s"]:
    """Return how many dropped tokens come after each kept one; positions below 0 are no tokens.

    All tokens that a head holds stand without gaps before some are dropped, since earlier gaps were closed. So this is
    by how much a key moves.
    """
    dropped = dropped.sort(-1).values
    after = dropped.shape[-1] - torch.searchsorted(dropped.contiguous(), kept.contiguous(), right=True)
    return after.masked_fill(kept < 0, 0)
