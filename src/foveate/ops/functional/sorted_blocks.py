"""Tokens sorted by a code, cut into blocks, and keys drawn at random: the choice of HyperAttention.

A call is computed in one or more segments at once: in a causal call, second halves read first halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import groups, masks, online_softmax
from foveate.core.call import AttentionCall
from foveate.core.online_softmax import Partial
from foveate.ops.functional.heads import accumulating, per_query_head

#: Logits that one slab may hold.
SLAB = 1 << 23
#: Queries in a block that has no keys.
QUERIES = 256
#: Random numbers are whole numbers below 2 ** BITS. Each head and segment shifts them by a multiple of GOLDEN, so that
#: they draw different keys from the same numbers.
BITS, GOLDEN = 31, 1327217885


class Segments(NamedTuple):
    """Equal segments of a sequence, each of which has its own queries and keys.

    Args:
        parts: the number of segments.
        n_queries, n_keys: tokens in each.
        step: distance from one segment's first key to the next one's.
        shift: distance from a segment's first key to its first query.
        number: the number of the first segment, which decides which keys it draws.
    """

    parts: int
    n_queries: int
    n_keys: int
    step: int = 0
    shift: int = 0
    number: int = 0

    def positions(self, device: torch.device) -> tuple[Int[Tensor, "s q"], Int[Tensor, "s k"]]:
        """Return the positions of the queries and of the keys."""
        first = torch.arange(self.parts, device=device)[:, None] * self.step
        queries = first + self.shift + torch.arange(self.n_queries, device=device)
        return queries, first + torch.arange(self.n_keys, device=device)


@dataclass(frozen=True)
class SortedBlocks:
    """The blocks of sorted queries and keys in each segment, and the drawn keys. Positions are those of the sequence.

    Args:
        queries: `(B, H, S, blocks, c)`; `END` fills up short blocks.
        keys: `(B, H, S, blocks, w)`.
        real: `(B, 1, S, blocks, w)`: False where a key only fills up a short block.
        drawn: keys drawn from all keys of a segment that are not hidden, `(B, H, S, m)`.
        drawn_block: the block of each of them; -1 for none.
        log_share: the log of the keys that each drawn key stands for, `(B, 1, S)`.
        places: the place of each query in `queries`, counted over blocks, `(B, H, S, n_queries)`.
    """

    queries: Int[Tensor, "b h s i c"]
    keys: Int[Tensor, "b h s i w"]
    real: Bool[Tensor, "b 1 s i w"]
    drawn: Int[Tensor, "b h s m"]
    drawn_block: Int[Tensor, "b h s m"]
    log_share: Float[Tensor, "b 1 s"]
    places: Int[Tensor, "b h s q"]


#: A position behind every sequence.
END = 2**40


def block_count(n_keys: int, block: int) -> int:
    """Return the number of blocks of at most `block` keys. For `block` 0 only queries are cut, to bound the memory."""
    return max(1, -(-n_keys // (block or QUERIES)))


def sorted_blocks(
    query_codes: Int[Tensor, "b hq n"], key_codes: Int[Tensor, "b hkv m"], hidden: Bool[Tensor, "_b m"] | None,
    segments: Segments, block: int, draws: Int[Tensor, " r"],
) -> SortedBlocks:  # fmt: skip
    """Sort queries and keys by their codes, cut both into the same number of blocks, and draw keys.

    Hidden keys are sorted behind the others. They belong to no block and are not drawn. The blocks divide the other
    keys, and the queries, as evenly as whole numbers allow.
    """
    device, heads = query_codes.device, query_codes.shape[1]
    here, there = segments.positions(device)
    queries = _order(query_codes[:, :, here])
    codes = key_codes[:, :, there]
    n_real = codes.new_full((codes.shape[0], 1, segments.parts), segments.n_keys)
    if hidden is not None:
        away = hidden.expand(codes.shape[0], -1)[:, None, there]
        n_real, codes = (~away).sum(-1), torch.where(away, END, codes)
    keys = per_query_head(_order(codes) + there[:, :1], heads)
    blocks = block_count(segments.n_keys, block)
    slots, real = _slots(n_real, blocks, -(-segments.n_keys // blocks) if block else 1)
    ranks = _ranks(draws, heads, segments, n_real)
    drawn_block = _block_of(ranks, n_real[..., None], blocks)
    return SortedBlocks(
        queries=_query_blocks(queries + here[:, :1], blocks),
        keys=_at(keys, slots),
        real=real if block else torch.zeros_like(real),
        drawn=_at(keys, ranks),
        drawn_block=drawn_block if block else torch.full_like(drawn_block, -1),
        log_share=(n_real.double() / max(draws.shape[0], 1)).log(),
        places=_places(queries, blocks),
    )


def _order(codes: Int[Tensor, "b h s n"]) -> Int[Tensor, "b h s n"]:
    return codes.sort(dim=-1, stable=True).indices


def _slots(n: Int[Tensor, "*s"], blocks: int, width: int) -> tuple[Int[Tensor, "*s i w"], Bool[Tensor, "*s i w"]]:
    """Return the ranks in each of the blocks that divide `n` tokens, and which of them the block really has."""
    ends = torch.arange(blocks + 1, device=n.device) * n[..., None] // blocks
    slots = ends[..., :-1, None] + torch.arange(width, device=n.device)
    return slots, slots < ends[..., 1:, None]


def _block_of(ranks: Tensor, n: Tensor | int, blocks: int) -> Tensor:
    """Return the block that holds each rank: the last one that starts at or before it."""
    return ((ranks + 1) * blocks - 1) // (n.clamp_min(1) if isinstance(n, Tensor) else n)


def _at(positions: Int[Tensor, "b h s n"], ranks: Tensor) -> Tensor:
    """Return the positions at ranks `(B, H or 1, S, ...)`; ranks beyond the end give the last."""
    flat = ranks.clamp_max(positions.shape[-1] - 1).flatten(3)
    found = positions.gather(-1, flat.expand(*positions.shape[:3], -1))
    return found.unflatten(-1, ranks.shape[3:])


def _query_blocks(queries: Int[Tensor, "b h s q"], blocks: int) -> Int[Tensor, "b h s i c"]:
    n = queries.shape[-1]
    slots, real = _slots(torch.tensor(n, device=queries.device), blocks, -(-n // blocks))
    return torch.where(real, queries[..., slots.clamp_max(n - 1)], END)


def _places(order: Int[Tensor, "b h s q"], blocks: int) -> Int[Tensor, "b h s q"]:
    """Return the place of each query in its blocks, from the order of the queries."""
    n = order.shape[-1]
    ranks = order.sort(dim=-1).indices
    block = _block_of(ranks, n, blocks)
    return block * -(-n // blocks) + ranks - block * n // blocks


def _ranks(
    draws: Int[Tensor, " r"], heads: int, segments: Segments, n_real: Int[Tensor, "b 1 s"]
) -> Int[Tensor, "b h s r"]:
    """Draw ranks below `n_real`, uniformly and with replacement, for each head and segment."""
    number = (segments.number + torch.arange(segments.parts, device=draws.device)) * heads
    number = number + torch.arange(heads, device=draws.device)[:, None]
    return (draws + number[..., None] * GOLDEN) % 2**BITS * n_real[..., None] >> BITS


# -- attention -----------------------------------------------------------------------------------------------------


def attend_blocks(call: AttentionCall, choice: SortedBlocks) -> Partial:
    """Return the partial result of the blocks and of the drawn keys, for the queries of all segments in their order."""
    b, h, segments, blocks, tall = choice.queries.shape
    drawn = groups.gathered(call.k, choice.drawn), groups.gathered(call.v, choice.drawn)
    logits = b * h * segments * tall * (choice.keys.shape[-1] + choice.drawn.shape[-1])
    step = max(1, SLAB // max(1, logits))
    slabs = (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))
    parts = [_slab(call, choice, at, drawn) for at in slabs]
    whole = Partial(*(torch.cat(each, 3).flatten(3, 4) for each in zip(*parts, strict=True)))
    places = choice.places[..., None]
    return Partial(*(x.gather(3, places.expand(*places.shape[:4], x.shape[4])).flatten(2, 3) for x in whole))


def _slab(call: AttentionCall, choice: SortedBlocks, at: slice, drawn: tuple[Tensor, Tensor]) -> Partial:
    """Compute some blocks: `(B, H, S, blocks, c, ·)`."""
    wide, queries, keys = accumulating(call.q.dtype), choice.queries[..., at, :], choice.keys[..., at, :]
    q = groups.gathered(call.q, queries.clamp_max(call.n_queries - 1)).to(wide) * call.scale
    k, v = groups.gathered(call.k, keys), groups.gathered(call.v, keys)
    seen = masks.combine(groups.mask_at(call.mask, queries, keys), choice.real[..., at, None, :])
    near = online_softmax.partial(groups.hide(q @ k.to(wide).mT, seen), v)
    if not choice.drawn.shape[-1]:
        return near
    number = torch.arange(at.start, at.stop, device=q.device)[:, None, None]
    other = choice.drawn_block[..., None, None, :] != number
    seen = masks.combine(groups.mask_at(call.mask, queries, choice.drawn[..., None, :]), other)
    logits = (q.flatten(3, 4) @ drawn[0].to(wide).mT).unflatten(3, q.shape[3:5])
    logits = groups.hide(logits + choice.log_share[..., None, None, None].to(wide), seen)
    far = online_softmax.partial(logits.flatten(3, 4), drawn[1])
    return online_softmax.merge(near, Partial(*(x.unflatten(3, q.shape[3:5]) for x in far)))


def multiplicity(choice: SortedBlocks, n_queries: int, n_keys: int) -> Float[Tensor, "b h q k"]:
    """Return how often each pair counts: 1 in a block, the keys that it stands for if drawn, 0 for all others.

    It takes O(N²) memory.
    """
    b, h, _, blocks, _ = choice.keys.shape
    device = choice.keys.device
    batch = torch.arange(b, device=device).reshape(-1, 1, 1, 1, 1, 1)
    head = torch.arange(h, device=device).reshape(-1, 1, 1, 1, 1)
    found = torch.zeros(b, h, n_queries + 1, n_keys, dtype=torch.float64, device=device)
    queries = choice.queries.clamp_max(n_queries)[..., None]
    real = choice.real[..., None, :].to(found.dtype)
    found.index_put_((batch, head, queries, choice.keys[..., None, :]), real, accumulate=True)
    other = choice.drawn_block[..., None, None, :] != torch.arange(blocks, device=device)[:, None, None]
    share = choice.log_share.exp()[..., None, None, None] * other
    found.index_put_((batch, head, queries, choice.drawn[..., None, None, :]), share, accumulate=True)
    return found[:, :, :n_queries]
