"""RazorAttention: whole caches for retrieval heads, and one compensation token for what the others drop.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (2024), arXiv 2407.15891. There is no official
code. Two things that the text leaves open are arguments here: whether echo and induction scores sum or average over
earlier occurrences, and whether the window counts the new token (it does). The ALiBi branch, which reads head horizons
off weights, is not needed for rotary models and is not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.scoring import dot_product
from foveate.host.method import Method
from foveate.host.model import Host
from foveate.host.run import apply
from foveate.host.site import Site
from foveate.host.slots import Slots
from foveate.kv.heads import check_heads, keep_window, per_kv_head, split_at_budget, top
from foveate.kv.policy import Policy, Progress

_ROWS = 256


@final
@dataclass(eq=False)
class RazorAttention(Policy):
    """Retrieval heads keep the whole cache; the others keep sinks, a window, and the mean of what they dropped.

    Prefill is dense; the cache is cut once after it and then slides. A dropped stretch of `N_d` tokens leaves one slot
    with its mean key and mean value and `log N_d` added to its logit, which is exact where keys and values do not vary
    over it. Memory falls to about `share + (1 - share) · window / N`. Needs rotary positions and some heads that repeat
    what they saw; heads are found with random tokens, without data.

    Args:
        heads: bool `(layers, kv_heads)`, True keeps everything; None finds them when the method is applied.
        echo, induction: shares of query heads that are protected for attending to the same token, and to the token
            after it, of an earlier occurrence (the paper's 1 % and 14 %); read where `heads` is None.
        sink: first tokens that every head keeps.
        min_window: least window of the other heads; it is `max(min_window, N / ratio)`.
        ratio: see `min_window`.
        compensate: whether dropped tokens leave their compensation slot.
    """

    heads: Tensor | None = None
    echo: float = 0.01
    induction: float = 0.14
    sink: int = 4
    min_window: int = 4000
    ratio: float = 5.0
    compensate: bool = True
    evicts: ClassVar[bool] = True
    _found: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        validate.between("echo", self.echo, 0.0, 1.0)
        validate.between("induction", self.induction, 0.0, 1.0)
        validate.at_least("sink", self.sink, 0)
        validate.at_least("min_window", self.min_window, 1)
        validate.at_least("ratio", self.ratio, 1.0)

    def bind(self, host: Host) -> None:
        if self.heads is not None:
            check_heads("heads", self.heads, host)
        self._found = (
            self.heads if self.heads is not None else razor_heads(host, echo=self.echo, induction=self.induction)
        )

    def keep(self, site: Site) -> Tensor | None:
        assert self._found is not None
        recent = max(self.min_window, int(site.seen / self.ratio))
        if site.seen <= self.sink + recent:
            return None
        return keep_window(site, self._found[site.layer], self.sink, recent)

    def fold(self, site: Site, dropped: Slots, summary: Slots | None) -> Slots | None:
        return compensation(dropped, summary) if self.compensate else None

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        return head_scores(host)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Heads are protected in the paper's proportion, one by echo to fourteen by
        induction.
        """
        full, window = split_at_budget(budget, host, length)
        scores = learnt or head_scores(host)
        echo, induction = (per_kv_head(scores[kind], host.kv_heads) for kind in ("echo", "induction"))
        found = top(echo, -(-full // 15))
        found = found | top(induction.masked_fill(found, -1.0), full - int(found.sum()))
        sink = min(4, window - 1)
        return cls(heads=found, sink=sink, min_window=max(1, window - sink - 1), ratio=float(length))


def compensation(dropped: Slots, summary: Slots | None) -> Slots | None:
    """One slot a head that stands for everything dropped so far: running means of keys and values, and their count."""
    real = (dropped.positions >= 0).to(dropped.k.dtype)[..., None]
    k, v, count = (dropped.k * real).sum(2, keepdim=True), (dropped.v * real).sum(2, keepdim=True), real.sum(2)
    if summary is not None and summary.count is not None:
        before = summary.count.to(k.dtype)
        k, v, count = k + summary.k * before[..., None], v + summary.v * before[..., None], count + before
    share = count[..., None].clamp_min(1.0)
    return Slots(k / share, v / share, dropped.positions.new_full((*count.shape[:2], 1), -2), count.float())


def razor_heads(
    host: Host,
    *,
    length: int | None = None,
    repeats: int = 4,
    echo: float = 0.01,
    induction: float = 0.14,
    seed: int = 0,
) -> Bool[Tensor, "l hkv"]:
    """Key/value heads to protect: the union of the best query heads by echo and by induction score, as shares of
    all.
    """
    scores = head_scores(host, length=length, repeats=repeats, seed=seed)
    total = host.layers * host.heads
    best = top(scores["echo"], max(1, round(echo * total))) | top(scores["induction"], max(1, round(induction * total)))
    return per_kv_head(best.float(), host.kv_heads) > 0


@torch.no_grad()
def head_scores(
    host: Host,
    *,
    length: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    occurrences: Literal["sum", "mean"] = "sum",
) -> dict[str, Float[Tensor, "l hq"]]:
    """Each query head's `"echo"` and `"induction"` score on `length` random tokens repeated `repeats` times.

    Args:
        host: the model.
        length: random tokens; None is the paper's 2,500, or a quarter of what the trained context holds.
        repeats: how often they stand; queries of the second and later ones count.
        seed: of the tokens.
        occurrences: whether a query's weights on its earlier occurrences add up or are averaged.
    """
    context = int(getattr(host.config, "max_position_embeddings", None) or 10_000)
    length = min(2500, context // (4 * repeats)) if length is None else length
    validate.at_least("length", length, 2)
    validate.at_least("repeats", repeats, 2)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, host.vocabulary, (length,), generator=draw).repeat(repeats)[None]
    probe = _Probe(length, occurrences)
    with apply(host.model, probe):
        host.model(tokens.to(host.model.device), use_cache=False)
    layers = range(host.layers)
    return {
        "echo": torch.stack([probe.echo[i] for i in layers]),
        "induction": torch.stack([probe.induction[i] for i in layers]),
    }


class _Probe(Method):
    """Reads the weights at whole periods back (echo) and one after that (induction), a few rows at a time."""

    def __init__(self, period: int, occurrences: str) -> None:
        self.period, self.occurrences = period, occurrences
        self.echo: dict[int, Tensor] = {}
        self.induction: dict[int, Tensor] = {}

    def read(self, site: Site, out: Tensor) -> None:
        k, n = site.k.repeat_interleave(site.groups, 1), site.q.shape[2]
        totals = torch.zeros(2, site.q.shape[1])
        for start in range(self.period, n, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, n), device=k.device)
            logits = dot_product(site.q[:, :, rows], k[:, :, : int(rows[-1]) + 1], site.scale).float()
            future = torch.arange(logits.shape[-1], device=k.device) > rows[:, None]
            weights = logits.masked_fill(future, float("-inf")).softmax(-1)
            totals += torch.stack([self._at(weights, rows, shift).sum((0, 2)).cpu() for shift in (0, 1)])
        totals /= site.q.shape[0] * (n - self.period)
        self.echo[site.layer], self.induction[site.layer] = totals[0], totals[1]

    def _at(self, weights: Tensor, rows: Tensor, shift: int) -> Tensor:
        """`(B, H, rows)` weight on `shift` after each earlier occurrence of the query's token."""
        back = torch.arange(1, int(rows[-1]) // self.period + 1, device=rows.device) * self.period
        keys = rows[:, None] - back + shift
        real = (keys - shift >= 0) & (keys >= 0)
        index = keys.clamp_min(0).expand(*weights.shape[:2], *keys.shape)
        found = weights.gather(3, index) * real
        return found.sum(-1) if self.occurrences == "sum" else found.sum(-1) / real.sum(-1)
