"""RazorAttention: retrieval heads keep whole caches, the others one compensation token for all that they drop.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (2024), arXiv 2407.15891. There is no official
code. The text leaves two points open. Whether echo and induction scores sum or average over earlier occurrences is an
argument here. Whether the window counts the new token: a step sees its own token beside the window, and what it leaves
is the window with that token. The ALiBi branch, which reads head horizons from weights, is not needed for rotary models
and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import safe_softmax
from foveate.host import SUMMARY, Ends, Host, Layout, Slots
from foveate.host.hf.layout import layout
from foveate.host.method import Method
from foveate.host.padding import tokens
from foveate.host.probing import Progress, cached, logits_of, read
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget
from foveate.kv.parts.head_split import (
    HeadTable,
    check_heads,
    keep_ends,
    own_lengths,
    per_kv_head,
    split_at_budget,
    top,
)

_ROWS = 256


@final
@dataclass(eq=False)
class RazorAttention(Policy):
    """Retrieval heads keep the whole cache; the others keep sinks, a window, and the mean of their dropped tokens.

    Prefill is dense. After it the cache is cut once, and then the window slides. `N_d` dropped tokens become one slot
    with their mean key and mean value; `log N_d` is added to its logit. This is exact if keys and values do not vary
    among them. Memory falls to about `share + (1 - share) · window / N`. Needs rotary positions and some heads that
    repeat earlier tokens; these heads are found with random tokens, without data. The wrong choice where answers come
    from heads that repeat nothing.

    Args:
        heads: bool `(layers, kv_heads)`, True keeps everything; None finds them when the method is applied.
        echo, induction: shares of query heads that are protected because they attend to an earlier occurrence of the
            same token, and to the token after it (the paper's 1 % and 14 %); used if `heads` is None.
        sink: first tokens that every head keeps.
        min_window: smallest window of the other heads; the window is `max(min_window, N / ratio)`. A step sees one
            token more, its own: `min_window + 1` at least.
        ratio: see `min_window`.
        compensate: whether dropped tokens become a compensation slot.
    """

    heads: Tensor | None = None
    echo: float = 0.01
    induction: float = 0.14
    sink: int = 4
    min_window: int = 4000
    ratio: float = 5.0
    compensate: bool = True
    evicts: ClassVar[bool] = True
    _full: HeadTable | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        validate.between("echo", self.echo, 0.0, 1.0)
        validate.between("induction", self.induction, 0.0, 1.0)
        if self.heads is not None and not isinstance(self.heads, Tensor):
            raise OptionError(
                f"heads must be a bool tensor (layers, kv_heads) or None; got {type(self.heads).__name__}"
            )
        validate.count("sink", self.sink)
        validate.count("min_window", self.min_window, 1)
        validate.at_least("ratio", self.ratio, 1.0)
        validate.flag("compensate", self.compensate)

    def bind(self, host: Host) -> None:
        found = layout(host)
        check_heads("heads", self.heads if self.heads is not None else found.table, host)
        heads = razor_heads(host, echo=self.echo, induction=self.induction) if self.heads is None else self.heads
        self._full = HeadTable(heads.bool() & found.table, found)

    def at(self, site: Site) -> bool:
        assert self._full is not None
        return not self._full.holds_all(site)

    def keep(self, site: Site) -> Tensor | Ends | None:
        assert self._full is not None
        if site.seen <= self.sink + self.min_window:
            return None
        lengths = own_lengths(site)
        recent: int | Tensor
        if isinstance(lengths, Tensor):
            recent = (lengths / self.ratio).to(lengths.dtype).clamp_min(self.min_window)
        else:
            recent = max(self.min_window, int(lengths / self.ratio))
        return keep_ends(site, self.sink, recent, self._full.numbers(site))

    def fold(self, site: Site, dropped: Slots, summary: Slots | None, heads: Tensor) -> Slots | None:
        if not self.compensate:
            return None
        if (found := tokens(site)) is not None:  # padding does not count
            dropped = replace(dropped, positions=found.own(dropped.positions))
        return compensation(dropped, summary)

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        return head_scores(host)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The paper's proportion holds: for one head by echo, fourteen by induction."""
        check_budget(budget, length)
        may, full, window = split_at_budget(budget, host, length)
        scores, found = learnt or head_scores(host), layout(host)
        for kind in ("echo", "induction"):
            check_scores(kind, scores[kind], found)
        echo, induction = (per_kv_head(scores[kind], found).masked_fill(~may, -1.0) for kind in ("echo", "induction"))
        chosen = top(echo, -(-full // 15))
        chosen = chosen | top(induction.masked_fill(chosen, -1.0), full - int(chosen.sum()))
        sink = min(4, window - 1)
        return cls(heads=chosen & may, sink=sink, min_window=max(1, window - sink - 1), ratio=float(length))


def compensation(dropped: Slots, summary: Slots | None) -> Slots | None:
    """Return one slot for each head that represents all dropped tokens: means of keys and values, and their weight.

    Means are stored in float32: in a shorter type they would stop changing after many tokens.
    """
    real = (dropped.positions >= 0).float() * (1.0 if dropped.weight is None else dropped.weight)
    if summary is None or summary.weight is None:
        width = dropped.k.shape[-1], dropped.v.shape[-1]
        k, v = (torch.zeros(*real.shape[:2], 1, size, device=real.device) for size in width)
        count, positions = torch.zeros_like(real[..., :1]), dropped.positions.new_full((*real.shape[:2], 1), SUMMARY)
    else:
        k, v, count, positions = summary.k, summary.v, summary.weight, summary.positions
    new = real.sum(-1, keepdim=True)
    count = count + new
    share = (new / count.clamp_min(1.0))[..., None]  # of the new tokens in the mean
    k, v = (_updated_mean(*pair, dropped, real, new, share) for pair in ((k, dropped.k), (v, dropped.v)))
    return Slots(k, v, positions, count)


def _updated_mean(
    mean: Tensor, x: Tensor, dropped: Slots, real: Tensor, count: Tensor, share: Tensor
) -> Float[Tensor, "b h 1 d"]:
    """Return a mean in float32 with some slots of any type added; slots that are not `real` may hold anything."""
    x = torch.where(real[..., None] > 0, x, 0.0)
    if x.shape[2] > 1:
        x = x if dropped.weight is None else x * real[..., None]
        x = x.sum(2, keepdim=True, dtype=torch.float32) / count.clamp_min(1.0)[..., None]
    return torch.lerp(mean, x.float(), share)


def check_scores(name: str, scores: Tensor, found: Layout) -> None:
    """Refuse a table of query heads that is not `(layers, heads)`."""
    expected = (len(found), found.heads)
    if tuple(scores.shape) != expected:
        raise ShapeError(f"{name} must be (layers, heads)={expected} for this model; got {tuple(scores.shape)}")


def razor_heads(
    host: Host,
    *,
    length: int | None = None,
    repeats: int = 4,
    echo: float = 0.01,
    induction: float = 0.14,
    seed: int = 0,
) -> Bool[Tensor, "l hkv"]:
    """Return the key/value heads to protect: those of the best query heads by echo and by induction score.

    `echo` and `induction` are shares of all query heads. See `head_scores` for the rest.
    """
    scores, found = head_scores(host, length=length, repeats=repeats, seed=seed), layout(host)
    total = sum(layer.heads for layer in found.layers)
    best = top(scores["echo"], max(1, round(echo * total))) | top(scores["induction"], max(1, round(induction * total)))
    return per_kv_head(best.float(), found) > 0


def head_scores(
    host: Host,
    *,
    length: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    occurrences: Literal["sum", "mean"] = "sum",
) -> dict[str, Float[Tensor, "l hq"]]:
    """Return each query head's `"echo"` and `"induction"` score on `length` random tokens repeated `repeats` times.

    Heads of layers whose window ends before the last occurrence score 0. The scores are stored as long as the model
    lives and its weights do not change.

    Args:
        host: the model.
        length: random tokens; None is the paper's 2,500, or a quarter of what the trained context holds.
        repeats: number of repetitions; queries of the second and later ones count.
        seed: seed of the tokens.
        occurrences: whether a query's weights on its earlier occurrences add up or are averaged.
    """
    context = int(getattr(host.config, "max_position_embeddings", None) or 10_000)
    length = min(2500, context // (4 * repeats)) if length is None else length
    validate.at_least("length", length, 2)
    validate.at_least("repeats", repeats, 2)
    validate.one_of("occurrences", occurrences, ("sum", "mean"))
    options = ("head_scores", length, repeats, seed, occurrences)
    return cached(host, options, lambda: _probe(host, length, repeats, seed, occurrences))


def _probe(host: Host, length: int, repeats: int, seed: int, occurrences: str) -> dict[str, Float[Tensor, "l hq"]]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, host.vocabulary, (length,), generator=draw).repeat(repeats)[None]
    found = layout(host)
    probe = _Probe(length, occurrences, [x.layer for x in found.layers if x.window is None or x.window > length])
    read(host, tokens, probe)
    scores = {"echo": torch.zeros(len(found), found.heads), "induction": torch.zeros(len(found), found.heads)}
    for row, layer in enumerate(found.layers):
        if layer.layer in probe.found:
            for kind, score in zip(("echo", "induction"), probe.found[layer.layer], strict=True):
                scores[kind][row, : layer.heads] = score
    return scores


class _Probe(Method):
    """A method that sums the weights whole periods back (echo) and one token later (induction), some rows at a time."""

    def __init__(self, period: int, occurrences: str, layers: list[int]) -> None:
        self.period, self.occurrences, self.layers = period, occurrences, layers
        self.found: dict[int, Float[Tensor, "2 hq"]] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal and site.layer in self.layers

    def read(self, site: Site, out: Tensor) -> None:
        n, device = site.q.shape[2], site.q.device
        totals = torch.zeros(2, site.q.shape[1], device=device)
        for start in range(self.period, n, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, n), device=device)
            weights = safe_softmax(logits_of(site, rows))
            totals += torch.stack([self._at(weights, rows, shift).sum((0, 2)) for shift in (0, 1)])
        self.found[site.layer] = (totals / (site.q.shape[0] * (n - self.period))).cpu()

    def _at(self, weights: Tensor, rows: Tensor, shift: int) -> Tensor:
        """Return the weight `(B, H, rows)` on the keys `shift` after each earlier occurrence of the query's token."""
        back = torch.arange(1, int(rows[-1]) // self.period + 1, device=rows.device) * self.period
        keys = rows[:, None] - back + shift
        real = (keys - shift >= 0) & (keys >= 0)
        index = keys.clamp_min(0).expand(*weights.shape[:2], *keys.shape)
        found = weights.gather(3, index) * real
        return found.sum(-1) if self.occurrences == "sum" else found.sum(-1) / real.sum(-1)
