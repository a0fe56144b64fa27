"""Groups: heads of a layer that hold equally many slots, in one buffer that is written in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.host.slots.ends import Ends, Ledger
from foveate.host.slots.slots import EMPTY, SUMMARY, Fold, Refit, Slots, grown, joined, narrow, packed


class Group:
    """Key/value heads that hold equally many slots, in one buffer with some room at its end.

    Attributes:
        numbers: numbers of the heads in the layer.
        heads: the numbers as a tensor, `(h,)`.
        index: the numbers as a slice if they are consecutive, else as a tensor.
        length: slots in use, including empty ones between them; the rest of the buffer is room.
        holes: least and largest number of empty slots in a row, that is, in one head of one sequence.
        summary: slots that represent dropped tokens, in full precision; the buffer begins with a copy of them.
        slots: the slots in use, without the summary: views of the buffer.
        order: another object whenever a slot has moved. New tokens take empty slots, or slots at the end.
        is_sorted: whether the tokens stand in the order of their positions: none has taken an empty slot before others.
    """

    def __init__(self, numbers: list[int], slots: Slots, holes: tuple[int, int], summary: Slots | None = None) -> None:
        self.numbers, self.holes = numbers, holes
        self.heads = torch.tensor(numbers, dtype=torch.long, device=slots.k.device)
        self.summary: Slots | None = None
        is_range = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else False
        self.index: slice | Tensor = slice(numbers[0], numbers[-1] + 1) if is_range else self.heads
        self._ledger: Ledger | None = None
        self._front, self.order, self.is_sorted = 0, object(), True
        self._use(slots, slots.positions.shape[2])
        if summary is not None:
            self._summarise(summary)

    def _use(self, buffer: Slots, length: int) -> None:
        self._buffer, self.length = buffer, length
        first, end = self._front, self._front + length
        self.slots = buffer if not first and end == buffer.positions.shape[2] else narrow(buffer, first, end)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("slots", "order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make `slots` from the buffer again: `pickle` would store the views separately."""
        self.__dict__.update(state)
        self.order = object()
        self._use(self._buffer, self.length)

    @property
    def has_empty(self) -> bool:
        return self.holes[1] > 0

    @property
    def rows(self) -> int:
        """Number of sequences times number of heads."""
        return self._buffer.positions.shape[0] * self._buffer.positions.shape[1]

    @property
    def stored(self) -> int:
        """Number of slots that are needed, over batch and heads: those of the longest row, and of the summary."""
        return self.rows * (self.length - self.holes[0] + self._front)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and weights in memory, room included."""
        held = [x for s in (self._buffer, self.summary) if s is not None for x in (s.k, s.v, s.weight) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    def all(self) -> Slots:
        """Return the summary and then the slots, as attention reads them; see `bias`."""
        return narrow(self._buffer, 0, self._front + self.length) if self._front else self.slots

    @property
    def bias(self) -> Float[Tensor, "b h s"] | None:
        """The term added to the logits of `all()`: the log of the weight of each slot; None for no term."""
        weight = self._buffer.weight
        return None if weight is None else weight[:, :, : self._front + self.length].log()

    @property
    def is_weighted(self) -> bool:
        return self._buffer.weight is not None

    def _summarise(self, summary: Slots | None) -> None:
        """Write the summary of dropped slots to the front of the buffer."""
        size = 0 if summary is None else summary.positions.shape[2]
        if size != self._front or (summary is not None and size and not self._may_write(summary)):
            buffer, n = narrow(self._buffer, self._front, self._buffer.positions.shape[2]), self.length
            shape = (*buffer.positions.shape[:2], size)
            front = Slots(*(x.new_empty(*shape, *x.shape[3:]) for x in (buffer.k, buffer.v, buffer.positions)))
            self._front, self.order = size, object()
            self._use(joined([front, buffer]), n)
        self.summary = summary
        if summary is None or not size:
            return
        if summary.weight is not None:
            self._use(self._buffer.weighted(), self.length)
        buffer = self._buffer
        buffer.k[:, :, :size] = summary.k
        buffer.v[:, :, :size] = summary.v
        buffer.positions[:, :, :size] = SUMMARY
        if buffer.weight is not None:
            buffer.weight[:, :, :size] = 1.0 if summary.weight is None else summary.weight

    def append(self, k: Tensor, v: Tensor, first: int) -> None:
        """Store tokens at positions `first`, `first + 1` …: in empty slots that every row has, then at the end."""
        n = k.shape[2]
        fill = min(n, self.holes[0])
        self._make_room(n - fill, k)
        if fill:
            self._fill(k[:, :, :fill], v[:, :, :fill], first)
            self.is_sorted = False
            self.holes = (self.holes[0] - fill, self.holes[1] - fill)
        if n > fill:
            self._write(self._front + self.length, k[:, :, fill:], v[:, :, fill:], first + fill)
            if self._ledger is not None:
                self._ledger.extend(self.length, self.length + n - fill)
            self._use(self._buffer, self.length + n - fill)

    def place(self, k: Tensor, v: Tensor, positions: Int[Tensor, "b 1 n"], empty: tuple[int, int]) -> None:
        """Store tokens at given positions, at the end; `empty` are the numbers of those in a row that are none."""
        n = k.shape[2]
        self._make_room(n, k)
        self._write(self._front + self.length, k, v, 0)
        self._buffer.positions[:, :, self._front + self.length :][:, :, :n] = positions
        self.holes = (self.holes[0] + empty[0], self.holes[1] + empty[1])
        self._ledger = None
        self._use(self._buffer, self.length + n)

    def _write(self, slot: int, k: Tensor, v: Tensor, first: int) -> None:
        """Write tokens at positions `first`, `first + 1` … to the buffer's slots from `slot` on."""
        buffer, n = self._buffer, k.shape[2]
        buffer.k[:, :, slot : slot + n] = k
        buffer.v[:, :, slot : slot + n] = v
        if buffer.weight is not None:
            buffer.weight[:, :, slot : slot + n] = 1.0
        if n == 1:
            buffer.positions[:, :, slot] = first
        else:
            new = torch.arange(first, first + n, device=k.device, dtype=torch.int32)
            buffer.positions[:, :, slot : slot + n] = new

    def _fill(self, k: Tensor, v: Tensor, first: int) -> None:
        """Write tokens to each row's first empty slots."""
        if self._ledger is not None:
            for place, slot in enumerate(self._ledger.fill(k.shape[2])):
                one = slice(place, place + 1)
                self._write(self._front + slot, k[:, :, one], v[:, :, one], first + place)
            return
        slots, n = self.slots, k.shape[2]
        positions = torch.arange(first, first + n, device=k.device, dtype=torch.int32).expand(*k.shape[:3])
        empty = slots.positions == EMPTY
        if n == 1:
            index = empty.to(torch.uint8).argmax(-1, keepdim=True)
        else:
            index = (~empty).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n]
        slots.k.scatter_(2, index[..., None].expand(*index.shape, k.shape[-1]), k)
        slots.v.scatter_(2, index[..., None].expand(*index.shape, v.shape[-1]), v)
        slots.positions.scatter_(2, index, positions)
        if slots.weight is not None:
            slots.weight.scatter_(2, index, 1.0)

    def _make_room(self, n: int, like: Tensor) -> None:
        """Make sure that the buffer has room for `n` more slots and may be written to."""
        buffer, end = self._buffer, self._front + self.length
        if n > buffer.positions.shape[2] - end:
            room = n if end == 0 else n + end // 32  # no room after a prompt; later, a copy every 32nd part
            self._use(buffer.each(lambda x: grown(x[:, :, :end], room)), self.length)
        elif torch.is_grad_enabled() or self._is_frozen:
            # earlier results need these tensors unchanged for their gradients, also if only queries have one
            self._use(buffer.each(Tensor.clone), self.length)

    @property
    def _is_frozen(self) -> bool:
        """Return whether some tensor was made in inference mode, and may not be written to out of it."""
        made = [x for x in (self._buffer.k, self._buffer.weight) if x is not None]
        return not torch.is_inference_mode_enabled() and any(x.is_inference() for x in made)

    def _may_write(self, summary: Slots) -> bool:
        """Return whether the summary at the buffer's front may be overwritten."""
        if self._is_frozen:
            return False
        return not (torch.is_grad_enabled() and (summary.k.requires_grad or self._buffer.k.requires_grad))

    def slide(self, ends: Ends, seen: int, fold: Fold | None) -> bool | None:
        """Drop the tokens that `ends` drops after `seen` tokens, and return whether any were dropped.

        None if this needs a mask: many tokens have to be dropped, or rows hold different tokens.
        """
        held = self.length - self.holes[0]
        if self.holes[0] != self.holes[1] or seen - ends.recent < ends.sink:
            return None
        if self._ledger is None or self._ledger.sink != ends.sink:
            if held - (ends.sink + ends.recent) > max(1, held // 32):
                return None
            self._ledger = Ledger.read(self.slots.positions, ends.sink)
        ledger = self._ledger
        if ledger is None:
            return None
        count = min(len(ledger.slots), seen - ends.recent - ledger.oldest)
        if count <= 0:
            return False
        if self.holes[0] + count > max(1, (held - count) // 32):
            return None
        places = ledger.drop(count)
        if fold is not None:
            dropped = [narrow(self.slots, place, place + 1) for place in places]
            self._summarise(fold(dropped[0] if count == 1 else joined(dropped), self.summary, self.heads))
        self._own_positions()
        for place in places:
            self.slots.positions[:, :, place] = EMPTY
        self.holes = (self.holes[0] + count, self.holes[1] + count)
        return True

    def kept(self, keep: Bool[Tensor, "b h s"]) -> Int[Tensor, "2 b h"]:
        """Return how many slots each head of each sequence would keep, and how many it holds."""
        filled = self.slots.positions >= 0
        return torch.stack([(keep & filled).sum(-1, dtype=torch.int32), filled.sum(-1, dtype=torch.int32)])

    def evict(
        self, keep: Bool[Tensor, "b h s"], counts: list[list[int]], before: list[list[int]], fold: Fold | None,
        refit: Refit | None,
    ) -> tuple[list[Group], bool]:  # fmt: skip
        """Drop slots. Return the groups that result, one for each number of slots, and whether any were dropped.

        A few dropped slots become empty in place, unless the others are refitted. Many are removed from the buffer, so
        that memory falls. `counts` and `before` are the numbers that `kept` returns.
        """
        if counts == before:
            return [self], False
        filled = self.slots.positions >= 0
        keep = keep & filled
        most = [max(column) for column in zip(*counts, strict=True)]
        least = [min(column) for column in zip(*counts, strict=True)]
        rows = [[b - a for a, b in zip(*row, strict=True)] for row in zip(counts, before, strict=True)]
        drops = [max(column) for column in zip(*rows, strict=True)]  # in each head, in the sequence that drops most
        if refit is None and min(most) == max(most) and self.length - most[0] <= max(1, most[0] // 32):
            self._ledger = None
            if fold is not None:
                self._summarise(fold(packed(self.slots, filled & ~keep, max(drops)), self.summary, self.heads))
            self._own_positions()
            self.slots.positions.masked_fill_(~keep, EMPTY)
            self.holes = (self.length - most[0], self.length - min(least))
            return [self], True
        return [self._part(size, least, most, drops, keep, filled, fold, refit) for size in sorted(set(most))], True

    def _own_positions(self) -> None:
        """Make sure that positions may be written to."""
        buffer = self._buffer
        if buffer.positions.is_inference() and not torch.is_inference_mode_enabled():
            self._use(replace(buffer, positions=buffer.positions.clone()), self.length)

    def _part(
        self, size: int, least: list[int], most: list[int], drops: list[int], keep: Tensor, filled: Tensor,
        fold: Fold | None, refit: Refit | None,
    ) -> Group:  # fmt: skip
        """Return the heads that now hold `size` slots, as a group of their own."""
        which = [head for head, count in enumerate(most) if count == size]
        mine = torch.tensor(which, device=self.heads.device)
        slots, keep, filled = self.slots.heads(mine), keep[:, mine], filled[:, mine]
        summary = None if self.summary is None else self.summary.heads(mine)
        kept, most_dropped = packed(slots, keep, size), max(drops[head] for head in which)
        if most_dropped and (fold is not None or refit is not None):
            dropped = packed(slots, filled & ~keep, most_dropped)
            summary = summary if fold is None else fold(dropped, summary, self.heads[mine])
            kept = kept if refit is None else refit(kept, dropped, self.heads[mine])
        numbers, holes = [self.numbers[head] for head in which], (0, size - min(least[head] for head in which))
        group = Group(numbers, kept, holes, summary)
        group.is_sorted = self.is_sorted
        return group

    def ordered(self) -> Slots:
        """Return the slots in the order of their positions, without slots that are empty in every row."""
        slots, empty = self.slots, self.holes[0]
        if not empty and not bool((slots.positions[..., 1:] < slots.positions[..., :-1]).any()):
            return slots.each(Tensor.contiguous)
        index = slots.positions.argsort(dim=-1)[..., empty:]  # empty slots come first
        return slots.take(index, torch.ones_like(index, dtype=torch.bool))

    def drop_after(self, end: int) -> None:
        """Remove the tokens at positions from `end` on."""
        slots = self.slots
        keep = (slots.positions >= 0) & (slots.positions < end)
        counts = keep.sum(-1)
        size = int(counts.max()) if counts.numel() else 0
        summary, self._front, self._ledger, self.order = self.summary, 0, None, object()
        self._use(packed(slots, keep), size)
        self.holes = (0, size - int(counts.min()) if counts.numel() else 0)
        self._summarise(summary)

    def batch(self, index: Tensor) -> Group:
        summary = None if self.summary is None else self.summary.batch(index)
        group = Group(self.numbers, self.slots.batch(index), self.holes, summary)
        group._ledger = None if self._ledger is None else self._ledger.copy()
        group.is_sorted = self.is_sorted
        return group
