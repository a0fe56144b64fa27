"""RazorAttention: whole caches for retrieval heads, and one compensation token for what the others drop.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (2024), arXiv 2407.15891. There is no official
code. Two things that the text leaves open are arguments here: whether echo and induction scores sum or average over
earlier occurrences, and whether the window counts the new token (it does). The ALiBi branch, which reads head horizons
off weights, is not needed for rotary models and is not here.
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
from foveate.host.hf import layout
from foveate.host.method import Method
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base import Policy, Progress, check_budget
from foveate.kv.parts.head_split import (
    HeadTable,
    check_heads,
    keep_ends,
    own_lengths,
    per_kv_head,
    split_at_budget,
    top,
)
from foveate.kv.parts.probing import kept, logits_of, read

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

    def fold(self, site: Site, dropped: Slots, summary: Slots | None) -> Slots | None:
        if not self.compensate:
            return None
        if (found := tokens(site)) is not None:  # padding is no loss
            dropped = replace(dropped, positions=found.own(dropped.positions))
        return compensation(dropped, summary)

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
    """One slot a head that stands for everything dropped so far: running means of keys and values, and their count.

    Means are kept in float32: in a shorter type they would not move any more once many tokens are counted.
    """
    real = (dropped.positions >= 0).float()
    if summary is None or summary.count is None:
        width = dropped.k.shape[-1], dropped.v.shape[-1]
        k, v = (torch.zeros(*real.shape[:2], 1, size, device=real.device) for size in width)
        count, positions = torch.zeros_like(real[..., :1]), dropped.positions.new_full((*real.shape[:2], 1), SUMMARY)
    else:
        k, v, count, positions = summary.k, summary.v, summary.count, summary.positions
    new = real.sum(-1, keepdim=True)
    count = count + new
    share = (new / count.clamp_min(1.0))[..., None]  # of the new tokens in the mean
    return Slots(_moved(k, dropped.k, real, new, share), _moved(v, dropped.v, real, new, share), positions, count)


def _moved(mean: Tensor, x: Tensor, real: Tensor, count: Tensor, share: Tensor) -> Float[Tensor, "b h 1 d"]:
    """A mean in float32, moved on by some slots, whatever their type; what is hidden may be anything."""
    x = torch.where(real[..., None] > 0, x, 0.0)
    if x.shape[2] > 1:
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
    """Key/value heads to protect: the union of the best query heads by echo and by induction score, as shares of
    all.
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
    """Each query head's `"echo"` and `"induction"` score on `length` random tokens repeated `repeats` times.

    Heads of layers whose window ends before the last occurrence score 0. What was found is kept for as long as the
    model lives and its weights stay what they are.

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
    validate.one_of("occurrences", occurrences, ("sum", "mean"))
    options = ("head_scores", length, repeats, seed, occurrences)
    return kept(host, options, lambda: _probe(host, length, repeats, seed, occurrences))


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
    """Reads the weights at whole periods back (echo) and one after that (induction), a few rows at a time."""

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
        """`(B, H, rows)` weight on `shift` after each earlier occurrence of the query's token."""
        back = torch.arange(1, int(rows[-1]) // self.period + 1, device=rows.device) * self.period
        keys = rows[:, None] - back + shift
        real = (keys - shift >= 0) & (keys >= 0)
        index = keys.clamp_min(0).expand(*weights.shape[:2], *keys.shape)
        found = weights.gather(3, index) * real
        return found.sum(-1) if self.occurrences == "sum" else found.sum(-1) / real.sum(-1)
