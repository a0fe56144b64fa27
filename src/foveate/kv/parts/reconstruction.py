"""Context reconstruction: how much each token of a text is attended to while the model repeats the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from foveate.core.errors import UnsupportedModel
from foveate.host import Method
from foveate.host.hf.chat_template import ChatTemplate
from foveate.host.padding import tokens
from foveate.host.pass_end import PassEnd, Reread
from foveate.host.site import Site
from foveate.kv.parts import slot_notes
from foveate.kv.parts.largest_weights import can_use_kernel, of_slots, of_whole_cache

#: What the model is asked: to repeat the text, or the part of it that begins with some tokens.
_ALL, _PART = "Repeat the previous context exactly.", "Repeat the part of the previous context exactly, starting with"


@dataclass(frozen=True)
class Instruction:
    """The tokens of the instruction before the first part of a text, and before a later part.

    Args:
        first: the instruction to repeat the text.
        later: the instruction to repeat the part that begins after some tokens, which follow it.
        answer: stands between the instruction, or these tokens, and the repetition.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> Instruction:
        """Return the instruction in a model's own tokens, before the end of its chat template, or of a line."""
        template = ChatTemplate(tokenizer, None, None)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False).input_ids)

        return cls(ids("\n\n" + _ALL), ids("\n\n" + _PART), ids(template.answer_begins or "\n"))


@dataclass(frozen=True)
class Reconstruction:
    """A second reading of a text, which scores its tokens.

    Methods with equal reconstructions, such as one with a budget for each layer, read a text again once together.

    The text is repeated in parts behind an instruction. A token's score in a key/value head is the largest weight that
    any query of the repetition of its part pays to it, over the head's query heads. These weights are over the text's
    first `sink` tokens, its part, and the repetition up to the query.

    Args:
        instruction: the tokens of the instruction; empty for a repetition without one.
        sink: first tokens of the text that every part sees.
        chunk: tokens in a part.
        overlap: last tokens of the part before, which tell the model where a later part begins.
        outputs: whether each weight is multiplied by the Euclidean norm of the token's value behind the output
            projection, and divided by the norm of the query's hidden state (KVzip+).
    """

    instruction: Instruction
    sink: int = 4
    chunk: int = 2048
    overlap: int = 8
    outputs: bool = False

    def measure(self, end: PassEnd, owner: object) -> None:
        """Put the scores of the pass's tokens into the slot notes of `owner`: the text is read again, if it has not yet
        been for another owner."""
        if end.ids is None:
            raise UnsupportedModel("a text is repeated from its tokens, and the model was given embeddings or pictures")
        first = end.shared.setdefault(self, owner)
        if first is owner:
            self._read(end.sites[0], end.ids, end.reread, owner)
            return
        for site in end.sites:
            known = slot_notes.find(site.notes(first), site)
            slot_notes.put(site.notes(owner), site, known, (site.positions >= 0) & (site.positions < site.seen))

    def _read(self, site: Site, ids: Int[Tensor, "b n"], reread: Reread, owner: object) -> None:
        own, lengths = _texts(site, ids)
        before = site.seen - ids.shape[1] if tokens(site) is None else None
        starts = own.new_zeros(len(own)) if before is None else torch.full_like(lengths, before)
        if before is None:
            found = tokens(site)
            assert found is not None
            starts = found.count.to(lengths.device) - lengths
        for start in range(0, int(lengths.max()), self.chunk):
            part, real = self._part(own, lengths, start)
            stop = (lengths - start).clamp(0, self.chunk) + starts + start
            reread(part, real, _Reader(self, owner, starts + start, stop))

    def _part(self, texts: Tensor, lengths: Tensor, start: int) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Return the instruction and one part of each text, padded at the end; a text that has ended gives padding."""
        rows = []
        for text, length in zip(texts, lengths.tolist(), strict=True):
            part = text[start : min(start + self.chunk, length)]
            head = self.instruction.first
            if start:
                head = (*self.instruction.later, *text[max(0, start - self.overlap) : start].tolist())
            rows.append(
                torch.cat([part.new_tensor((*head, *self.instruction.answer)), part]) if len(part) else text[:0]
            )
        real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), real


def _texts(site: Site, ids: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """Return the tokens of a pass without padding, each text from the first column on, and their numbers."""
    real = None if site.real is None else site.real[:, site.seen - ids.shape[1] : site.seen].to(ids.device)
    if real is None or bool(real.all()):
        return ids, torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
    return ids.gather(1, order), real.sum(-1)


class _Reader(Method):
    """A method that scores the tokens `starts` to `stops` of each sequence while the model repeats them."""

    def __init__(self, how: Reconstruction, owner: object, starts: Tensor, stops: Tensor) -> None:
        self.how, self.owner, self.starts, self.stops = how, owner, starts, stops

    def at(self, site: Site) -> bool:
        return site.slots is not None and site.slots.window is None

    def read(self, site: Site, out: Tensor) -> None:
        past = site.seen - site.q.shape[2]
        found, positions = tokens(site), site.positions
        own = (positions if found is None else found.own(positions)).masked_fill(positions < 0, -1)
        old = (positions >= 0) & (positions < past) & (own >= 0)
        starts, stops = (x.to(own.device)[:, None, None] for x in (self.starts, self.stops))
        mine = old & (own >= starts) & (own < stops)
        if can_use_kernel(site):
            part = slice(int(self.starts[0]), int(self.stops[0]))
            new = F.pad(
                of_whole_cache(site, self.how.sink, part, self.how.outputs), (part.start, own.shape[2] - part.stop)
            )
        else:
            seen = mine | (old & (own < self.how.sink)) | ((positions >= past) & (own >= 0))
            most = min(seen.shape[2], self.how.sink + int((stops - starts).max()) + site.q.shape[2])
            index = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
            scores = of_slots(site, index, seen.gather(2, index), self.how.outputs)
            new = torch.zeros(own.shape, device=own.device).scatter_(2, index, scores)
        notes = site.notes(self.owner)
        slot_notes.put(notes, site, torch.where(mine, new, slot_notes.find(notes, site)), old)
