"""MoA: each head keeps sinks and a window of its own, whose size grows with the text by a rule of its own.

MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024), arXiv 2406.14909. As in the
release, a head's cache holds its span in total, sinks included, rounded up to whole blocks and at least two of them,
while a span's cost is profiled with the sinks beside it. The release allots the cache once, for the prompt and the
tokens to come; here the text so far counts, so that nothing has to be known before. Rules are by key/value head: where
query heads share one, their influences add up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.selection import Blocks, Selection
from foveate.host import Ends, Host
from foveate.host.hf.layout import layout
from foveate.host.hf.model import host
from foveate.host.padding import tokens
from foveate.host.probing import Progress
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget
from foveate.kv.parts.head_split import check_heads
from foveate.kv.parts.influence import span_influence
from foveate.kv.parts.span_search import moa_search, span, spans

_ITEMS = 6  # calibration items, each read at two lengths
_TILE = 64


@final
@dataclass(eq=False)
class MoA(Policy):
    """A head keeps its first `sink` tokens and its latest ones, `alpha + beta · N` in total of a text of N.

    Rules come from `moa_search` over `moa_influence`: what hiding a distance from a head does to the loss, measured
    with gradients on a few texts. Memory falls to the mean of the spans. `prefill` reads prompts with the same windows,
    whose cost falls too. The wrong choice where any head may need any token, and without a calibration text that asks
    for far ones.

    Args:
        rules: `(layers, kv_heads, 2)`: alpha in tokens, beta in 0..1.
        sink: first tokens that every head keeps, fewer than two blocks.
        block: spans are rounded up to multiples of it, and are at least two blocks.
        prefill: whether prompts are read with the same windows; False reads them densely, and then drops.
    """

    rules: Tensor
    sink: int = 64
    block: int = 64
    prefill: bool = True
    evicts: ClassVar[bool] = True
    _rules: dict[int, tuple[tuple[float, float], ...]] = field(default_factory=dict, init=False, repr=False)
    _placed: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Tensor) or self.rules.dim() != 3 or self.rules.shape[2] != 2:
            got = tuple(self.rules.shape) if isinstance(self.rules, Tensor) else type(self.rules).__name__
            raise OptionError(f"rules must be a tensor (layers, kv_heads, 2), from moa_search; got {got}")
        betas = self.rules[..., 1]
        if not bool(((betas >= 0) & (betas <= 1)).all()):
            raise OptionError("rules must have beta in 0..1: a span grows with the text, and no faster than it")
        validate.count("sink", self.sink)
        validate.count("block", self.block, 1)
        if self.sink >= 2 * self.block:
            raise OptionError(f"sink={self.sink} must be below two blocks, {2 * self.block}, the least span of a head")
        validate.flag("prefill", self.prefill)

    def bind(self, host: Host) -> None:
        check_heads("rules", self.rules[..., 0], host)
        pairs = zip(layout(host).layers, self.rules.tolist(), strict=True)
        self._rules = {layer.layer: tuple(map(tuple, row[: layer.kv_heads])) for layer, row in pairs}
        self._placed = {}

    def at(self, site: Site) -> bool:
        return any(alpha < 0 or beta < 1 for alpha, beta in self._rules.get(site.layer, ()))

    def select(self, site: Site) -> Selection | None:
        if not self.prefill or site.q.shape[2] == 1 or site.phase != "prefill" or not site.is_causal:
            return None
        if (found := tokens(site)) is None:
            kept = self._spans(site)
            if min(kept) >= site.seen:
                return None
            sizes = torch.tensor([kept], device=site.q.device)
        else:
            sizes = spans(self._of(site), found.count[:, None], self.block)
        return _windows(site, sizes - self.sink, self.sink)

    def keep(self, site: Site) -> Tensor | Ends | None:
        if (found := tokens(site)) is None:
            kept = self._spans(site)
            if min(kept) >= site.seen:
                return None
            full = frozenset(head for head, size in enumerate(kept) if size >= site.seen)
            return Ends(self.sink, min(kept) - self.sink, full, tuple(size - self.sink for size in kept))
        own = found.own(site.positions)
        recent = spans(self._of(site), found.count[:, None], self.block)[..., None] - self.sink
        return (own >= 0) & ((own < self.sink) | (own >= found.count[:, None, None] - recent))

    def _spans(self, site: Site) -> list[int]:
        """Return the tokens that each head keeps of sequences without padding."""
        return [span(rule, site.seen, self.block) for rule in self._rules[site.layer]]

    def _of(self, site: Site) -> Float[Tensor, "hkv 2"]:
        """Return the rules of a layer on the device of its queries."""
        key = (site.layer, site.q.device)
        if key not in self._placed:
            self._placed[key] = torch.tensor(self._rules[site.layer], device=site.q.device)
        return self._placed[key]

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Profile a few items at one length and at half of it, on the answers of the data.

        These are what there is to retrieve. A model's own answers, the paper's choice, say nothing of retrieval where
        it does not follow the question: for a model that does, see `moa_influence`.
        """
        items = cls.profiled(data)
        found = span_influence(host, items, items=max(1, len(items)), sink=4, own=False, progress=progress)
        return {f"influence_{length}": each for length, each in found.items()}

    @staticmethod
    def profiled(data: Iterable[tuple[Tensor, Tensor]], items: int = _ITEMS) -> list[tuple[Tensor, Tensor]]:
        """Cut a few items to the length of the shortest, and each once more to half of it; the first token stays."""
        some = list(islice(data, items))
        length = min((ids.shape[1] for ids, _ in some), default=0)
        sizes = (length, length - length // 2 + 1)
        return [(_cut(ids, size), _cut(answers, size)) for ids, answers in some for size in sizes]

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The budget holds for `length` tokens; blocks are smaller for short texts."""
        total, found = cls.tokens(budget, length), layout(host)
        check_budget(budget, length)
        influence = {
            int(name.rpartition("_")[2]): each for name, each in learnt.items() if name.startswith("influence_")
        }
        if not influence:
            raise OptionError("moa needs the influence of this model's heads: measure it with MoA.calibrate")
        for each in influence.values():
            check_heads("influence", each[..., 0], host)
        block = max(1, min(64, total // 8))
        sink = min(4, 2 * block - 1)
        if budget >= 1.0:
            return cls(torch.tensor([0.0, 1.0]).expand(*found.table.shape, 2), sink=sink, block=block)
        rules = moa_search(
            influence, budget, lengths=(length,), block=block, least=0.9 * budget, table=found.table,
            windows=[layer.window for layer in found.layers],
        )  # fmt: skip
        return cls(rules, sink=sink, block=block)


def moa_influence(
    model: object, data: Iterable[tuple[Tensor, Tensor]], *, items: int = 8, sink: int = 64, own: bool = True,
    progress: Progress | None = None,
) -> dict[int, Float[Tensor, "l hkv n"]]:  # fmt: skip
    """Return what hiding each distance from each head costs, by length of the data, for `moa_search`.

    See `foveate.kv.parts.influence.span_influence`. The paper takes summaries of several documents of 2k, 4k and 8k
    tokens; the texts should need their far parts for the answers.
    """
    return span_influence(host(model), data, items=items, sink=sink, own=own, progress=progress)


def _cut(x: Tensor, size: int) -> Tensor:
    return torch.cat([x[:, :1], x[:, x.shape[1] - size + 1 :]], 1)


def _windows(site: Site, recent: Int[Tensor, "#b hkv"], sink: int) -> Selection:
    """Select the sinks and each head's own window for the queries of a prompt, in each sequence's own positions."""
    n, keys = site.q.shape[2], site.k.shape[2]
    groups, shape = site.groups, (site.q.shape[0], site.q.shape[1], -(-n // _TILE), -(-keys // _TILE))
    if site.is_whole and tokens(site) is None:  # positions are places; the rule holds no tensor of their size

        def plain(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k < sink) | (q + keys - n - k < recent[0, h // groups])

        blocks, whole = (x.repeat_interleave(groups, 1).expand(shape) for x in _tiles(n, keys, recent, sink))
        return Blocks(blocks, (_TILE, _TILE), n, keys, plain, whole)
    own, query = _places(site)
    groups, size = site.q.shape[1] // own.shape[1], recent.expand(own.shape[0], -1)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = own[b, h // groups, k.clamp_max(keys - 1)]
        near = query[b, q.clamp_max(n - 1)] - place < size[b, h // groups]
        return (place >= 0) & ((place < sink) | near)

    return Blocks(torch.ones(shape, dtype=torch.bool, device=site.q.device), (_TILE, _TILE), n, keys, rule)


def _places(site: Site) -> tuple[Int[Tensor, "b h s"], Int[Tensor, "b nq"]]:
    """Return the positions of keys and queries in their own sequences."""
    found, first = tokens(site), site.seen - site.q.shape[2]
    if found is None:
        return site.positions, torch.arange(first, site.seen, device=site.q.device).expand(site.q.shape[0], -1)
    return found.own(site.positions), found.rank[:, first : site.seen]


def _tiles(
    n: int, keys: int, size: Int[Tensor, "1 h"], sink: int
) -> tuple[Bool[Tensor, "1 h i j"], Bool[Tensor, "1 h i j"]]:
    """Return the tiles that a window or the sinks touch, and those that lie wholly inside."""
    first = torch.arange(-(-n // _TILE), device=size.device)[:, None] * _TILE + keys - n
    last = (first + _TILE - 1).clamp_max(keys - 1)
    start = torch.arange(-(-keys // _TILE), device=size.device) * _TILE
    end = start + _TILE - 1
    wide = size[:, :, None, None]
    return (first - end < wide) | (start < sink), (last - start < wide) | (end < sink)
