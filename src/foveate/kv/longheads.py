"""LongHeads: each head reads its own choice of chunks, at positions that never exceed the trained length.

LongHeads: Multi-Head Attention is Secretly a Long Context Processor (2024), arXiv 2402.10685. Two departures from the
release: a token of a prompt attends to itself also past the attention length, where the release leaves it out; and a
chunk's summary has a key for each query head of a group (the release is for models without groups).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import engines, masks, validate
from foveate.core.call import AttentionCall
from foveate.core.engines.fused import FEW
from foveate.core.engines.gather import SLAB
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Host
from foveate.host.attention import softmax_over
from foveate.host.hf.layout import layout
from foveate.host.padding import attend_unpadded
from foveate.host.site import Site
from foveate.kv.base.policy import Policy
from foveate.kv.parts.chosen_chunks import ChosenChunks
from foveate.kv.parts.chunk_keys import add_chunks
from foveate.kv.parts.head_split import check_reach, far_numbers
from foveate.kv.parts.last_query import has_everything
from foveate.kv.parts.own_places import Places
from foveate.kv.renumbered import Rotation, rotations


@final
@dataclass(eq=False)
class LongHeads(Policy):
    """Past `attention_length` tokens, each query and head reads the best chunks, as if these were the whole text.

    It acts on the prompt and while decoding, in both on the tokens past the attention length; those before attend as
    usual. A chunk of `chunk` tokens has one key for each query head, made from the chunk's attention to itself. A query
    scores these keys without positions, and reads the first chunk, the last two and the best others. Positions count
    over the chunks that it reads, so that no distance exceeds the attention length: this reads less, and it extends the
    context of models with rotary embeddings, without training. Nothing is evicted: memory stays, and the keys of the
    chunks and the queries of the unfinished chunk come on top. A step costs one product for each chunk and attention to
    `attention_length` keys; a prompt costs as much for every token, and more than a dense kernel until it is many
    times longer. The wrong choice if the trained length suffices and the prompt's
    time matters. The whole text has to be read under the method. Layers with a window of their own read all they hold.
    A soft cap applies to attention, and not to a chunk's summary of itself.

    Args:
        chunk: tokens in a chunk; 256 in the paper.
        attention_length: tokens that a query reads at most, a multiple of `chunk`; the trained length or less.
        keep_first: first chunks that are always read.
        keep_last: last chunks that are always read, the unfinished one included.
    """

    chunk: int = 256
    attention_length: int = 4096
    keep_first: int = 1
    keep_last: int = 2
    in_place: ClassVar[bool] = True
    _far: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    _rotations: dict[int, Rotation | None] = field(default_factory=dict, init=False, repr=False)
    _groups: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("attention_length", 1), ("keep_first", 0), ("keep_last", 1)):
            validate.count(name, getattr(self, name), least)
        if self.attention_length % self.chunk:
            raise OptionError(f"attention_length={self.attention_length} must be a multiple of chunk={self.chunk}")
        if self.chunks < self.keep_first + self.keep_last:
            raise OptionError(
                f"attention_length={self.attention_length} must hold keep_first + keep_last = "
                f"{self.keep_first + self.keep_last} chunks of {self.chunk}"
            )

    @property
    def chunks(self) -> int:
        """Number of chunks that a query reads."""
        return self.attention_length // self.chunk

    @property
    def tables(self) -> float:
        """See `Policy.tables`. The queries of one chunk are not counted."""
        return self._groups / (2 * self.chunk)

    def bind(self, host: Host) -> None:
        found = layout(host)
        if found.expands:
            raise UnsupportedModel(
                f"{type(host.model).__name__} computes its keys from its cache at each call, so that their positions "
                f"cannot be renumbered"
            )
        check_reach("attention_length: longheads", self.attention_length, host)
        self._far, self._rotations = far_numbers(host), rotations(host)
        self._groups = max(layer.heads // layer.kv_heads for layer in found.layers)

    def at(self, site: Site) -> bool:
        return site.layer in self._far and has_everything(site)

    def attend(self, site: Site) -> Tensor | None:
        if site.v.shape[3] != site.k.shape[3]:
            raise UnsupportedModel(
                f"longheads compares values with keys, whose widths differ in {type(site.module).__name__}: "
                f"{site.v.shape[3]} and {site.k.shape[3]}"
            )
        places = Places.of(site)
        table = add_chunks(site.notes(self), site, places, self.chunk, self._rotations.get(site.layer))
        if site.seen <= self.attention_length:
            return None
        read = self.attention_length - self.chunk + (site.seen - 1) % self.chunk + 1
        site.read_share = read / site.seen
        if not places.is_padded or site.q.shape[2] == 1:
            return self._attend(site, places, table)
        return attend_unpadded(site, lambda part, rows: self._attend(part, Places.of(part), table[rows]))

    def _attend(self, site: Site, places: Places, table: Tensor) -> Float[Tensor, "b hq nq d"]:
        """Attend to everything within the attention length, and then to chosen chunks, a few queries at a time."""
        (b, hq, n, d), out = site.q.shape, []
        usual = 0 if places.is_padded else min(max(0, self.attention_length - places.past), n)
        if usual:
            out.append(_densely(site.part(0, usual) if usual < n else site))
        each = self.attention_length if n <= FEW or places.is_padded else self.chunks
        tile = max(FEW + 1, SLAB // max(1, b * hq * each * d))
        for start in range(usual, n, tile):
            stop = min(start + tile, n)
            mask = None if site.is_plain_causal else site.part(start, stop).mask
            out.append(self._tile(site, places, table, slice(start, stop), mask))
        return torch.cat(out, 2)

    def choose(
        self, q: Float[Tensor, "b hq t d"], own: Int[Tensor, "b t"], table: Float[Tensor, "b hq c d"]
    ) -> tuple[Int[Tensor, "b hq t n"], Bool[Tensor, "b hq t n"]]:
        """Return the chunks that queries read, in order, and a mask of those that there are.

        Args:
            q: queries, rotated back to position 0.
            own: the queries' numbers in their sequence.
            table: the chunks' keys.
        """
        current = (own // self.chunk)[:, None, :, None]
        number = torch.arange(table.shape[2], device=q.device)
        free = (number >= self.keep_first) & (number <= current - self.keep_last)
        scores = (q @ table.mT).masked_fill(~free, masks.NEG_INF)
        best = scores.topk(min(self.chunks - self.keep_first - self.keep_last, table.shape[2])).indices
        last = current - torch.arange(self.keep_last - 1, -1, -1, device=q.device)
        first = torch.arange(self.keep_first, device=q.device).expand(*current.shape[:3], -1)
        real = [first <= current - self.keep_last, free.expand_as(scores).gather(3, best), last >= 0]
        heads = [x.expand(-1, q.shape[1], -1, -1) for x in (first, best, last)]
        valid = torch.cat([x.expand_as(y) for x, y in zip(real, heads, strict=True)], -1)
        chosen, order = torch.cat(heads, -1).masked_fill(~valid, torch.iinfo(torch.long).max).sort(-1)
        return chosen.masked_fill(~valid.gather(3, order), 0), valid.gather(3, order)

    def _tile(
        self, site: Site, places: Places, table: Tensor, rows: slice, mask: Tensor | None
    ) -> Float[Tensor, "b hq t d"]:
        """Attend to chosen chunks for some queries, for each head by itself."""
        q, own, w = site.q[:, :, rows], places.queries[:, rows].clamp_min(0), self.chunk
        rotation = self._rotations.get(site.layer)
        flat = own[:, None].expand(-1, q.shape[1], -1)
        chosen, valid = self.choose(q if rotation is None else rotation(q, -flat), own, table)
        # keys keep their embedding; the query turns instead, for each chunk by the distance that it should have
        rank = torch.arange(chosen.shape[3], device=q.device)
        place = (valid.sum(-1, keepdim=True) - 1) * w + (own % w)[:, None, :, None]
        by = place + (chosen - rank) * w - flat[..., None]
        turned = q[..., None, :].expand(*chosen.shape, -1)
        if rotation is not None:
            turned = rotation(turned.flatten(2, 3), by.flatten(2, 3)).view_as(turned)
        read = ChosenChunks(chosen, valid, own, w, site.scale, site.softcap, mask)
        if q.shape[2] > FEW and not places.is_padded:
            return read.by_chunk(turned, site.k, site.v)
        return read.by_query(turned, site.k, site.v, places.at)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. A query reads eight chunks, or more if these are longer than 256 tokens."""
        total = max(4, cls.tokens(budget, length))
        chunk = min(256, max(1, total // 8))
        chunks = -(-total // chunk) if budget == 1 else total // chunk
        return cls(chunk, chunks * chunk)


def _densely(site: Site) -> Float[Tensor, "b hq nq d"]:
    if site.softcap is not None:
        return softmax_over(site)
    causal = site.is_plain_causal and site.is_causal
    mask = site.key_mask if site.is_plain_causal else site.mask
    return engines.run(AttentionCall(site.q, site.k, site.v, site.scale, mask, causal, dropout=site.dropout), "fused")
