"""RocketKV: evict after the prompt, then read a few of the tokens that are left at each decoding step.

RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression (2025), arXiv 2502.14051. The
variant for several turns (RocketKV-MT), which evicts nothing, is left out. Two departures from the release: the
prompt's length alone sets the budget, since the number of new tokens is not known (the release counts it in, and takes
it from the tokens that are kept); and `ratio=1` reads everything, where the release would read the half of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, final

from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.selection import Indices, Selection
from foveate.host import Host
from foveate.host.attention import soft_capped
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base.policy import check_budget
from foveate.kv.base.scored import Heads, ScorePolicy
from foveate.kv.parts.head_split import far_numbers
from foveate.kv.parts.hybrid_scores import channel_products, largest_channels, token_weights
from foveate.kv.parts.stored_pages import stored_pages
from foveate.kv.parts.window_queries import LastQueries, per_kv_head, pooled, window_votes

#: Notes of stage 2 that do not outlast the reading of a prompt, or of a piece of it.
_STALE = ("pages", "full", "length")
#: The smallest token budget of a step in the paper.
_SMALLEST = 256


@final
@dataclass(eq=False)
class RocketKV(ScorePolicy):
    """The prompt's tokens are evicted by the attention of its last queries; each step then reads a few that are left.

    With a prompt of S tokens and a compression ratio c, the token budget of a step is t = S / c. Stage 1 keeps
    `S / c^a` tokens, `a = min(0.2 + 0.06 log2 c, 0.8)`, as SnapKV does. Stage 2 has the ratio `c2 = c^(1 - a)` left. It
    groups what is stored into pages of `p = min(floor(c2), ceil(sqrt(c2)))` tokens, estimates their weights from the
    extremes of their keys on the `D p / c2` channels with the largest |q|, and reads the t / 2 tokens with the largest
    weights; the other half of the budget pays for the estimate. Tokens that are made later are stored, and estimated
    like the others. Memory: what stage 1 keeps, and `1 / p` of it for the pages (none if p = 1). The wrong choice if
    the prompt's end does not know the question, as for every eviction. Layers with a window of their own only evict.
    Do not combine it with another method that evicts while decoding: pages would no longer fit.

    Args:
        ratio: the compression ratio c, at least 1; the paper reports up to 400.
        alpha: the exponent a, in 0..1; None is the formula of the release. 0 leaves all to stage 2, 1 all to stage 1.
        recent: queries that score, and last tokens that stay: 32 in the release, 128 for several questions on a text.
        pool: odd width of the max-pool of scores over neighbours, after heads are summed.
        sink, layers: see `ScorePolicy`. The release keeps no sinks by rule.
    """

    share: float = field(init=False, repr=False)
    heads: Heads = field(default="equal", init=False, repr=False)
    safeguard: float = field(default=0.0, init=False, repr=False)
    threshold: float | None = field(default=None, init=False, repr=False)
    limit: int | None = field(default=None, init=False, repr=False)
    every: int | None = field(default=None, init=False, repr=False)
    sink: int = 0
    recent: int = 32
    ratio: float = 8.0
    alpha: float | None = None
    pool: int = 63
    in_place: ClassVar[bool] = True
    _far: frozenset[int] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        validate.at_least("ratio", self.ratio, 1.0)
        if self.alpha is not None:
            validate.between("alpha", self.alpha, 0.0, 1.0)
        validate.count("recent", self.recent, 1)
        validate.count("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool} must be odd, so that a token stands in the middle of its pool")
        self.share = self.ratio**-self.exponent
        super().__post_init__()

    # -- the budget's split --------------------------------------------------------------------------------------------

    @property
    def exponent(self) -> float:
        """The part of the compression that stage 1 does, as an exponent of the ratio."""
        return min(0.2 + 0.06 * math.log2(self.ratio), 0.8) if self.alpha is None else self.alpha

    @property
    def page(self) -> int:
        """Tokens in a page of stage 2."""
        left = self.ratio * self.share
        return min(math.floor(left + 1e-9), math.ceil(math.sqrt(left) - 1e-9))

    @property
    def tables(self) -> float:
        """See `Policy.tables`."""
        return 1 / self.page if self.page > 1 else 0.0

    def channels(self, width: int) -> int:
        """Return the number of channels that the estimate reads, of `width`."""
        return min(width, max(1, round(width * self.page / (self.ratio * self.share))))

    def bind(self, host: Host) -> None:
        super().bind(host)
        self._far = far_numbers(host)

    # -- stage 1: evict after the prompt -------------------------------------------------------------------------------

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        votes = window_votes(site, LastQueries.of(site, self.recent))
        return pooled(per_kv_head(votes, site, "sum"), site, self.pool, "max")

    # -- stage 2: read a few of the tokens that are left ---------------------------------------------------------------

    def select(self, site: Site) -> Selection | None:
        if self.ratio == 1 or site.layer not in self._far or not site.is_causal:
            return None
        notes, found = site.notes(self), tokens(site)
        if site.phase == "prefill" or "prompt" not in notes:
            for name in _STALE:
                notes.pop(name, None)
            notes["prompt"], notes["longest"] = None if found is None else found.count, site.seen
        most = max(1, round(notes["longest"] / (2 * self.ratio)))
        if site.phase == "prefill" or site.k.shape[2] <= most:
            return None
        pages = stored_pages(site, notes, self.page)
        q = site.q[:, :, -1].unflatten(1, (site.k.shape[1], -1))
        channels, held = largest_channels(q, self.channels(q.shape[3]))
        logits = channel_products(q, channels, pages.table).float() * (site.scale / held.sqrt())
        weights = token_weights(soft_capped(logits, site.softcap), pages.sizes)
        own, real = pages.best(weights, most)
        if notes["prompt"] is not None:  # shorter sequences read fewer tokens
            count = (notes["prompt"] / (2 * self.ratio)).round().clamp_min(1)
            real = real & (real.cumsum(-1) <= count[:, None, None])
        counted = float(most) if notes["prompt"] is None else None
        return Indices(pages.at(own)[:, :, None], 1, site.k.shape[2], real[:, :, None], counted=counted)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The budget is what is stored, pages included: the ratio follows from it.

        A step then reads far fewer tokens than it stores. If its token budget were less than 256, the paper's smallest,
        the ratio is smaller and stage 1 does more of it. At least half of what is kept is scored, and the pool is at
        most a quarter of it.
        """
        check_budget(budget, length)
        ratios = (2 ** (step / 16) for step in range(16 * 24))
        made = next((x for x in map(cls._of_ratio, ratios) if x.share * (1 + x.tables) <= budget), cls(ratio=2.0**24))
        if made.ratio > 1 and length / made.ratio < _SMALLEST:
            made = cls._of_reads(budget, length)
        kept = max(1, round(made.share * length))
        return replace(made, recent=min(32, max(1, kept // 2)), pool=min(63, 2 * (kept // 8) + 1))

    @classmethod
    def _of_ratio(cls, ratio: float) -> Self:
        return cls(ratio=ratio)

    @classmethod
    def _of_reads(cls, budget: float, length: int) -> Self:
        """Return the policy that stores a budget, with a token budget of 256 or, if it stores less, of all of it."""
        least = 1 / max(budget, 1 / length)
        ratio = max(length / _SMALLEST, least)
        if ratio == least:
            return cls(ratio=ratio, alpha=1.0)
        parts = (cls(ratio=ratio, alpha=step / 64) for step in range(65))
        return next(x for x in parts if x.share * (1 + x.tables) <= budget or x.alpha == 1)
