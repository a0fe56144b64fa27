"""Codes: the tokens of a layer that are held encoded, in chunks of some heads and up to `CHUNK` tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.host.slots.codec import Codec, Coding, Parts
from foveate.host.slots.slots import EMPTY

#: Most tokens of a chunk, which attention decodes at once.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Chunk:
    """Encoded tokens of some heads. Nothing in it is ever encoded again.

    Args:
        numbers: numbers of the heads in the layer.
        coding: how they are encoded.
        k, v: the parts of keys and values.
        positions: the position of each token, `EMPTY` for a place without one.
        widths: channels of keys and of values.
        is_full: whether every place is known to hold a token.
    """

    numbers: tuple[int, ...]
    coding: Coding
    k: Parts
    v: Parts
    positions: Int[Tensor, "b h n"]
    widths: tuple[int, int]
    is_full: bool

    @cached_property
    def index(self) -> slice | Tensor:
        """The heads as a slice if they are consecutive, else as a tensor."""
        first, count = self.numbers[0], len(self.numbers)
        if self.numbers == tuple(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(self.numbers, device=self.positions.device)

    @property
    def length(self) -> int:
        return self.positions.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, norms, tables and positions."""
        return sum(x.nbytes for x in (*self.k.values(), *self.v.values(), self.positions))

    @property
    def slots(self) -> int:
        """Number of places, over batch and heads."""
        return self.positions.numel()

    def decode(self, what: Literal["k", "v"], dtype: torch.dtype) -> Tensor:
        """Decode keys or values, in the space of the codes."""
        codec, parts, width = self._of(what)
        return codec.decode(parts, width, dtype)

    def restore(self, what: Literal["k", "v"], x: Tensor) -> Tensor:
        """Map vectors of the chunk's heads back to the space of the model."""
        codec, parts, width = self._of(what)
        return codec.restore(x, parts, width)

    def into(self, q: Float[Tensor, "b h n d"]) -> Tensor:
        """Map queries into the space of the keys' codes."""
        return self.coding.keys.into(q, self.k)

    def _of(self, what: str) -> tuple[Codec, Parts, int]:
        if what == "k":
            return self.coding.keys, self.k, self.widths[0]
        return self.coding.values, self.v, self.widths[1]

    def batch(self, index: Tensor) -> Chunk:
        k, v = ({name: x[index] for name, x in parts.items()} for parts in (self.k, self.v))
        return replace(self, k=k, v=v, positions=self.positions[index])

    def heads(self, which: list[int]) -> Chunk:
        """Return some of its heads, by their place in it."""
        if len(which) == len(self.numbers):
            return self
        index = torch.tensor(which, device=self.positions.device)
        k, v = ({name: x[:, index] for name, x in parts.items()} for parts in (self.k, self.v))
        numbers = tuple(self.numbers[place] for place in which)
        return replace(self, numbers=numbers, k=k, v=v, positions=self.positions[:, index])

    def joined(self, other: Chunk) -> Chunk | None:
        """Return both as one chunk; None if they are too long or belong to different heads or codecs."""
        one, two = self.coding, other.coding
        same = self.numbers == other.numbers and (one.keys, one.values) == (two.keys, two.values)
        if not same or self.length + other.length > CHUNK:
            return None
        k, v = _joined(self.k, other.k, one.keys), _joined(self.v, other.v, one.values)
        positions = torch.cat([self.positions, other.positions], 2)
        return replace(self, k=k, v=v, positions=positions, is_full=self.is_full and other.is_full)

    # -- dropping ------------------------------------------------------------------------------------------------------

    def alive(self, keep: Bool[Tensor, "b h n"]) -> Bool[Tensor, "b h u"]:
        """Return which units hold a token that stays. A unit shares its rows, so that it stays or goes as a whole."""
        return (keep & (self.positions >= 0)).unflatten(2, (-1, self.coding.unit)).any(-1)

    def kept(self, keep: Bool[Tensor, "b h n"], counts: list[int]) -> Iterator[Chunk]:
        """Drop tokens. `counts` has the most units that stay in each head, over the batch.

        Dropped tokens become empty places. Units without a token are removed, so that memory falls.
        """
        unit, alive = self.coding.unit, self.alive(keep)
        marked = replace(self, positions=self.positions.masked_fill(~keep, EMPTY), is_full=False)
        for size in sorted(set(counts) - {0}):
            which = [place for place, count in enumerate(counts) if count == size]
            one = marked.heads(which)
            if size * unit == self.length:
                yield one
                continue
            mine = alive[:, which] if len(which) < len(counts) else alive
            order = (~mine).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
            yield replace(
                one, k=_units(one.k, order, self.length // unit, self.coding.keys),
                v=_units(one.v, order, self.length // unit, self.coding.values),
                positions=_gathered(one.positions, order, self.length // unit),
            )  # fmt: skip


class Codes:
    """All encoded tokens of a layer. In the layer's list of slots they come before those in full precision."""

    def __init__(self, chunks: list[Chunk], n_heads: int) -> None:
        self.chunks, self.n_heads = chunks, n_heads

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def slots(self) -> int:
        """Number of places, over batch and heads."""
        return sum(chunk.slots for chunk in self.chunks)

    def placed(self) -> list[tuple[Chunk, int]]:
        """Return each chunk with its first place in the layer's list of slots."""
        filled, out = [0] * self.n_heads, []
        for chunk in self.chunks:
            first = max(filled[head] for head in chunk.numbers)
            out.append((chunk, first))
            for head in chunk.numbers:
                filled[head] = first + chunk.length
        return out

    @property
    def length(self) -> int:
        """Number of places of the longest head."""
        return max((first + chunk.length for chunk, first in self.placed()), default=0)

    @property
    def has_empty(self) -> bool:
        """Return whether a list of the longest head's length has places without a token."""
        length = self.length
        even = all(sum(c.length for c in self.chunks if head in c.numbers) == length for head in range(self.n_heads))
        return not even or not all(chunk.is_full for chunk in self.chunks)

    def append(self, chunk: Chunk) -> None:
        joined = self.chunks[-1].joined(chunk) if self.chunks else None
        if joined is None:
            self.chunks.append(chunk)
        else:
            self.chunks[-1] = joined

    def tables(self, numbers: list[int], new: Parts) -> Parts:
        """Return the tables of some heads: `new`, or those that encoded the tokens that a sequence already holds."""
        out, at = {name: x.clone() for name, x in new.items()}, {head: place for place, head in enumerate(numbers)}
        for chunk in self.chunks if new else ():
            own, mine = {**chunk.k, **chunk.v}, [place for place, head in enumerate(chunk.numbers) if head in at]
            heads, held = [at[chunk.numbers[place]] for place in mine], (chunk.positions[:, mine] >= 0).any(-1)
            for name, x in ((name, x) for name, x in out.items() if name in own):
                known = held.reshape(*held.shape, *[1] * (x.dim() - 2))
                x[:, heads] = torch.where(known, own[name][:, mine], x[:, heads])
        return out

    def positions(self, like: Tensor) -> Int[Tensor, "b h s"]:
        """Return the position of every place, padded to the longest head."""
        out = torch.full((like.shape[0], self.n_heads, self.length), EMPTY, dtype=torch.int32, device=like.device)
        for chunk, first in self.placed():
            out[:, chunk.index, first : first + chunk.length] = chunk.positions
        return out

    def decoded(self, what: Literal["k", "v"], like: Tensor) -> Float[Tensor, "b h s d"]:
        """Return a decoded copy of all keys or values, for methods that read them; empty places hold zeros."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        out = like.new_zeros(like.shape[0], self.n_heads, self.length, like.shape[3])
        for chunk, first in self.placed():
            out[:, chunk.index, first : first + chunk.length] = chunk.restore(what, chunk.decode(what, dtype))
        return out

    def evict(self, keep: Bool[Tensor, "b h s"]) -> bool:
        """Drop tokens, and return whether any were dropped. `keep` has the shape of `positions`."""
        placed = self.placed()
        keeps = [keep[:, chunk.index, first : first + chunk.length] for chunk, first in placed]
        units = [chunk.alive(mine).sum(-1).amax(0) for (chunk, _), mine in zip(placed, keeps, strict=True)]
        drops = [((chunk.positions >= 0) & ~mine).any() for (chunk, _), mine in zip(placed, keeps, strict=True)]
        if not placed:
            return False
        numbers = torch.cat([torch.stack(drops).long(), *units]).tolist()  # the host waits for the device here, once
        dropped, counts = numbers[: len(placed)], numbers[len(placed) :]
        left: list[Chunk] = []
        for (chunk, _), mine, drop in zip(placed, keeps, dropped, strict=True):
            own, counts = counts[: len(chunk.numbers)], counts[len(chunk.numbers) :]
            left += chunk.kept(mine, own) if drop else [chunk]
        self.chunks = left
        return any(dropped)

    def drop_after(self, end: int) -> None:
        """Remove the tokens at positions from `end` on. Their places stay, empty, if others share their rows."""
        if self.chunks:
            self.evict(self.positions(self.chunks[0].positions) < end)

    def batch(self, index: Tensor) -> Codes:
        return Codes([chunk.batch(index) for chunk in self.chunks], self.n_heads)


def _joined(one: Parts, two: Parts, codec: Codec) -> Parts:
    """Join the rows of two parts. Where tables differ, the first part has no token: the later ones hold for both."""
    return {name: two[name] if name in codec.tables else torch.cat([x, two[name]], 2) for name, x in one.items()}


def _units(parts: Parts, order: Int[Tensor, "b h n"], units: int, codec: Codec) -> Parts:
    """Gather some units of each part."""
    return {name: x if name in codec.tables else _gathered(x, order, units) for name, x in parts.items()}


def _gathered(x: Tensor, order: Int[Tensor, "b h n"], units: int) -> Tensor:
    """Gather some units of `(b, h, rows, ...)`, in which each unit has equally many rows."""
    split = x.unflatten(2, (units, -1))
    index = order.reshape(*order.shape, *[1] * (split.dim() - 3))
    return split.gather(2, index.expand(*order.shape, *split.shape[3:])).flatten(2, 3)
