"""The stream between the blocks of a model in one forward pass, from which methods drop tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import OptionError, shown
from foveate.host.kept import index_of, joined, restored, taken
from foveate.host.spans import Spans
from foveate.host.stack_part import StackPart


@dataclass(eq=False)
class Stream:
    """The tokens between the blocks of a stack, in one forward pass.

    Args:
        part: "image" for the blocks of an image encoder, "text" for all others.
        depth: number of blocks.
        batch, tokens: sequences, and tokens that the pass reads of each, dropped ones included.
        past: tokens of the sequences before the pass.
        step: the notes of methods on the pass, as in `Site.step`.

    Attributes:
        index: the tokens that are left, `(B, N)`, as indices of the tokens that the pass reads, in order; `EMPTY` in
            rows that hold fewer. None if all are left.
        counts: tokens that each block read, so far.
        real: tokens of the pass that are no padding, `(B, tokens)`; None if none is padding, or if it is unknown.
        notes: what methods store on this pass through the stack.
        shift: how much earlier the position of each token that is left has become, `(B, N)`; None for not at all.
        later_shift: the same for tokens that come after the pass, `(B,)`.
        empty: the least and the largest number of empty entries in a row.
        is_done: whether the dropped tokens are back.
    """

    part: StackPart
    depth: int
    batch: int
    tokens: int
    past: int = 0
    step: dict[Any, Any] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    index: Int[Tensor, "b n"] | None = None
    counts: list[int] = field(default_factory=list)
    real: Bool[Tensor, "b t"] | None = None
    shift: Int[Tensor, "b n"] | None = None
    later_shift: Int[Tensor, " b"] | None = None
    empty: tuple[int, int] = (0, 0)
    is_done: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    _before: list[tuple[Tensor, Tensor, bool]] = field(default_factory=list, repr=False)
    _drops: list[int] = field(default_factory=list, repr=False)
    _spans: Callable[[Tensor | None], Spans] | None = field(default=None, repr=False)

    @property
    def spans(self) -> Mapping[str, Bool[Tensor, "b n"]]:
        """The spans of the tokens that are left, bool `(B, N)` by name; none in an image encoder."""
        return {} if self._spans is None else self._spans(self.index)

    @property
    def is_token(self) -> Bool[Tensor, "b n"] | None:
        """A mask of the entries that are tokens: neither padding nor empty; None if all are, or if it is unknown."""
        if self.index is None:
            return self.real
        filled = self.index >= 0
        return filled if self.real is None else filled & taken(self.real, self.index)

    def narrow(
        self, keep: Bool[Tensor, "b n"], hidden: Float[Tensor, "b n c"], who: str, renumber: bool, holes: bool = False
    ) -> Float[Tensor, "b k c"]:
        """Drop tokens, and return the hidden states of the others.

        Args:
            keep: the tokens that stay.
            hidden: the hidden states.
            who: the name of the method, for errors.
            renumber: whether the others take consecutive positions.
            holes: whether the dropped tokens are none. Those behind a sequence's last one then come back as that one,
                so that the text goes on behind it.
        """
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != hidden.shape[:2]:
            raise OptionError(
                f"drop() of {who} must be bool {tuple(hidden.shape[:2])}, True for the tokens that stay; got "
                f"{shown(keep)}"
            )
        keep = keep.to(hidden.device)
        if self.index is not None:
            keep = keep & (self.index >= 0)
        least, most, stays, has_last = self._asked(keep)  # the host waits for the device here, once
        if stays:
            return hidden
        if holes and not most:
            raise OptionError(
                f"{who} leaves none of the {self.tokens} tokens of a call, which are all an image's; leave "
                f"prefill_chunk_size out"
            )
        if not holes and not least:
            raise OptionError(f"drop() of {who} must keep at least one token of each sequence")
        if self.part == "text" and not holes and not has_last:
            raise OptionError(f"drop() of {who} must keep the last token of each sequence, whose logits are read")
        if renumber:
            self._renumber(keep)
        chosen = index_of(keep, most)
        self._before.append((hidden, chosen, holes))
        self.empty = (0, most - least)
        self.index = joined(self.index, chosen)
        self.shift = None if self.shift is None else taken(self.shift, chosen)
        self.memo = {}
        return taken(hidden, chosen)

    def _asked(self, keep: Bool[Tensor, "b n"]) -> tuple[int, int, bool, bool]:
        """Return the least and the largest number of tokens that stay, whether all do, and whether the last ones do."""
        counts, real = keep.sum(1), self.is_token
        filled = torch.ones_like(keep) if self.index is None else self.index >= 0
        last = keep[:, -1] if real is None else keep.gather(1, _last(real))[:, 0]
        found = torch.stack([counts.min(), counts.max(), (keep == filled).all().long(), last.all().long()]).tolist()
        return found[0], found[1], bool(found[2]), bool(found[3])

    def _renumber(self, keep: Bool[Tensor, "b n"]) -> None:
        """Count the dropped tokens before each token. Padding has no position of its own, and does not count."""
        real = self.is_token
        gone = (~keep if real is None else ~keep & real).long()
        before = gone.cumsum(1)  # of tokens that stay, which do not count themselves
        self.shift = before if self.shift is None else self.shift + before
        self.later_shift = gone.sum(1) if self.later_shift is None else self.later_shift + gone.sum(1)

    def note_block(self, hidden: Tensor) -> None:
        """Count the tokens that the next block reads."""
        self.counts.append(hidden.shape[1])
        self._drops.append(len(self._before))

    def release(self) -> None:
        """Release the tensors of the pass; what is left of its tokens stays."""
        self._before, self._drops, self.memo, self.step, self.notes = [], [], {}, {}, {}
        self._spans = self.real = None

    def restore(self, hidden: Float[Tensor, "b k c"], fill: float | None = None) -> Float[Tensor, "b t c"]:
        """Return hidden states of all tokens: each dropped one as it was when it was dropped, or `fill`."""
        return self._restore(hidden, len(self._before), fill)

    def restore_each(self, states: tuple[Any, ...], fill: float | None = None) -> tuple[Any, ...]:
        """Return the inputs of all blocks and the output of the last one, with the tokens dropped before each."""
        drops = [*self._drops, len(self._before)]
        if len(states) != len(drops):
            return states
        return tuple(
            self._restore(x, done, fill) if isinstance(x, Tensor) and x.shape[1] != self.tokens else x
            for x, done in zip(states, drops, strict=True)
        )

    def _restore(self, hidden: Tensor, drops: int, fill: float | None) -> Tensor:
        for whole, index, holes in reversed(self._before[:drops]):
            last = hidden[:, -1:]
            hidden = restored(hidden, index, whole if fill is None else torch.full_like(whole, fill))
            if holes:
                places = torch.arange(whole.shape[1], device=whole.device)
                hidden = torch.where((places > index[:, -1:])[..., None], last, hidden)
        return hidden


def _last(real: Bool[Tensor, "b n"]) -> Int[Tensor, "b 1"]:
    """Return each row's last entry that is a token."""
    return real.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1, keepdim=True)
