"""Stores: all slots of a layer, in groups of heads that hold equally many."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.host.slots.codes import Codes
from foveate.host.slots.ends import Ends
from foveate.host.slots.group import Group
from foveate.host.slots.slots import EMPTY, Fold, Refit, Slots


class Store:
    """All slots of a layer, in groups of heads, and before them the tokens that are held encoded.

    `padded` returns one tensor of all heads in order, padded to the longest; it is a view if heads hold equally many
    and nothing is encoded.
    """

    def __init__(self, groups: list[Group], n_heads: int, codes: Codes | None = None) -> None:
        self.groups, self.n_heads, self.codes = groups, n_heads, codes

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> Store:
        """Return an empty store for tensors like these."""
        none = torch.empty(*k.shape[:2], 0, dtype=torch.int32, device=k.device)
        slots = Slots(k.new_empty(*k.shape[:2], 0, k.shape[3]), v.new_empty(*v.shape[:2], 0, v.shape[3]), none)
        return cls([Group(list(range(k.shape[1])), slots, (0, 0))], k.shape[1])

    def append(self, k: Tensor, v: Tensor, first: int) -> None:
        if self.is_even:
            self.groups[0].append(k, v, first)
            return
        for group in self.groups:
            group.append(k[:, group.index], v[:, group.index], first)

    def place(self, k: Tensor, v: Tensor, positions: Tensor, empty: tuple[int, int]) -> None:
        """Store tokens at given positions, behind all others.

        Args:
            k, v: keys and values.
            positions: of the tokens, `(B, N)`; `EMPTY` for none.
            empty: the least and the largest number of entries in a row that are none.
        """
        for group in self.groups:
            group.place(k[:, group.index], v[:, group.index], positions[:, None], empty)

    @property
    def layout(self) -> tuple[object, ...] | None:
        """Objects that are others whenever a slot of `padded` has moved; None if that cannot be told."""
        return None if self.codes is not None else tuple(group.order for group in self.groups)

    @property
    def rows(self) -> int:
        """Number of sequences times number of heads."""
        return sum(group.rows for group in self.groups)

    @property
    def stored(self) -> int:
        return sum(group.stored for group in self.groups) + (0 if self.codes is None else self.codes.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, weights and codes in memory."""
        return sum(group.nbytes for group in self.groups) + self._coded_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes of keys, values, weights and codes that are stored, without the room at the end of buffers."""
        return sum(group.stored * self.token_bytes for group in self.groups) + self.weight_bytes + self._coded_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of a token of one head in full precision."""
        slots = self.groups[0].slots
        return slots.k.element_size() * slots.k.shape[3] + slots.v.element_size() * slots.v.shape[3]

    @property
    def _coded_bytes(self) -> int:
        return 0 if self.codes is None else self.codes.nbytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of the slots that are needed."""
        return sum(4 * group.stored for group in self.groups if group.is_weighted)

    @property
    def is_even(self) -> bool:
        """Return whether all heads hold equally many slots, in one tensor, without summary, weights and codes."""
        group = self.groups[0]
        return len(self.groups) == 1 and group.summary is None and not group.is_weighted and self.codes is None

    def is_whole(self, seen: int) -> bool:
        """Return whether nothing was ever dropped: one group, every position once."""
        first = self.groups[0]
        return self.is_even and first.length == seen and not first.has_empty

    @property
    def is_sorted(self) -> bool:
        """Return whether all heads hold equally many tokens, in the order of their positions, and no empty slot."""
        return self.is_even and self.groups[0].is_sorted and not self.groups[0].has_empty

    def holds(self, n: int) -> bool:
        """Return whether every head of every sequence holds exactly `n` tokens, in a store that `is_even`."""
        least, most = self.groups[0].holes
        return self.is_even and least == most and self.groups[0].length - most == n

    def padded(self, what: str) -> Tensor:
        """Return `"positions"`, `"k"`, `"v"` or `"bias"` of all heads (summaries first), padded to the longest head."""
        fill = EMPTY if what == "positions" else 0
        parts = [_of(group, what) for group in self.groups]
        if len(parts) == 1 and self.codes is None:
            return parts[0]
        batch, _, _, *width = parts[0].shape
        longest, first = max(part.shape[2] for part in parts), self.coded_length
        out = parts[0].new_full((batch, self.n_heads, first + longest, *width), fill)
        if self.codes is not None:
            if what == "positions":
                out[:, :, :first] = self.codes.positions(out)
            elif what != "bias":
                out[:, :, :first] = self.codes.decoded("k" if what == "k" else "v", parts[0])
        for group, part in zip(self.groups, parts, strict=True):
            out[:, group.index, first : first + part.shape[2]] = part
        return out

    @property
    def is_weighted(self) -> bool:
        """Return whether some slot may have another weight than 1."""
        return any(group.is_weighted for group in self.groups)

    @property
    def coded_length(self) -> int:
        """Number of slots of `padded` that are held encoded; they come first."""
        return 0 if self.codes is None else self.codes.length

    @property
    def has_empty(self) -> bool:
        """Return whether `padded` has empty slots."""
        coded = self.codes is not None and self.codes.has_empty
        return coded or len(self.groups) > 1 or self.groups[0].has_empty

    def slide(self, ends: Ends, seen: int, fold: Fold | None = None) -> bool | None:
        """Drop what `ends` drops, and return whether anything was dropped; None if some group needs a mask."""
        if self.codes is not None:
            return None
        dropped: bool | None = False
        for group in self.groups:
            numbers = set(group.numbers)
            if numbers <= ends.full:
                continue
            mine = None if numbers & ends.full else ends.of(numbers)
            done = None if mine is None else group.slide(mine, seen, fold)
            if done is None:
                return None
            dropped = dropped or done
        return dropped

    def evict(self, keep: Bool[Tensor, "b h s"], fold: Fold | None = None, refit: Refit | None = None) -> bool:
        """Drop slots, and return whether any were dropped.

        `keep` has the shape of `padded("positions")`. Summaries stay; `fold` may add dropped slots to them. `refit` may
        change the slots that stay, in groups that drop some.
        """
        parts: list[Group] = []
        any_dropped = False
        if self.codes is not None:
            coded = self.codes.length
            any_dropped, keep = self.codes.evict(keep[:, :, :coded]), keep[:, :, coded:]
        masks = [self._part(group, keep) for group in self.groups]
        counts = [group.kept(mask) for group, mask in zip(self.groups, masks, strict=True)]
        after, before = torch.cat(counts, 2).tolist()  # the host waits for the device here, once
        first = 0
        for group, mask in zip(self.groups, masks, strict=True):
            own = slice(first, first + len(group.numbers))
            left, dropped = group.evict(mask, [row[own] for row in after], [row[own] for row in before], fold, refit)
            parts, any_dropped, first = parts + left, any_dropped or dropped, own.stop
        self.groups = parts
        return any_dropped

    def _part(self, group: Group, keep: Bool[Tensor, "b h s"]) -> Bool[Tensor, "b g n"]:
        """Return the part of a mask of all heads that is about a group's slots, without its summary."""
        skip = 0 if group.summary is None else group.summary.positions.shape[2]
        mine = keep if len(self.groups) == 1 else keep[:, group.heads]
        return mine[:, :, skip : skip + group.length]

    def drop_after(self, end: int) -> None:
        """Remove the tokens at positions from `end` on."""
        for group in self.groups:
            group.drop_after(end)
        if self.codes is not None:
            self.codes.drop_after(end)

    def batch(self, index: Tensor) -> Store:
        codes = None if self.codes is None else self.codes.batch(index)
        return Store([group.batch(index) for group in self.groups], self.n_heads, codes)


def _of(group: Group, what: str) -> Tensor:
    if what != "bias":
        return getattr(group.all(), what)
    bias = group.bias
    return torch.zeros(group.all().positions.shape, device=group.heads.device) if bias is None else bias
