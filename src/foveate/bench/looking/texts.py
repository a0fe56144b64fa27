"""The texts of a file as tokens, cut to what the model reads, and the batches that they are read in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.bench.comparison.encoding import encoded
from foveate.core.errors import TaskError
from foveate.tasks.files.texts import texts

_WINDOW = 16  # batches among whose texts those of about the same length are put together


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a file.

    Args:
        ids: the tokens of each text.
        empty: the number of rows without a text.
        cut: the number of texts that were cut.
        longest: the most tokens of a text.
    """

    ids: list[Int[Tensor, " n"]]
    empty: int
    cut: int
    longest: int | None

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    def digest(self) -> str:
        """Return the digest of all tokens, and of where texts begin."""
        found = hashlib.sha256()
        for ids in self.ids:
            found.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
        return found.hexdigest()[:32]

    def notes(self) -> list[str]:
        """Return what was left out, in words."""
        notes = []
        if self.empty:
            notes.append(f"{_counted(self.empty, 'row')} without a text left out")
        if self.cut:
            notes.append(f"{_counted(self.cut, 'text')} cut to {self.longest:,} tokens")
        return notes


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def read_texts(
    path: Path, tokenizer: Any, *, field: str | None, most: int | None, longest: int | None,
    note: Callable[[str], None],
) -> Texts:  # fmt: skip
    """Encode the texts of a file.

    Args:
        path, field: see `foveate.tasks.files.texts.texts`.
        tokenizer: the model's.
        most: the number of rows to read; None for all.
        longest: the most tokens of a text; None for no limit.
        note: called with messages about the progress.
    """
    found, empty, cut = list[Tensor](), 0, 0
    for number, (_, text) in enumerate(islice(texts(path, field), most), 1):
        if not text.strip():
            empty += 1
            continue
        ids = encoded(tokenizer, text)
        if not ids:
            empty += 1
            continue
        cut += longest is not None and len(ids) > longest
        found.append(torch.tensor(ids[:longest], dtype=torch.int32))
        if number % 256 == 0:
            note(f"encoding texts, {number:,} so far")
    if not found:
        raise TaskError(f"data={str(path)!r} holds no text")
    return Texts(found, empty, cut, longest)


def batches(lengths: list[int], size: int) -> list[list[int]]:
    """Return the texts of each batch: neighbours in the file, of which those of about the same length come together."""
    found, window = list[list[int]](), _WINDOW * size
    for start in range(0, len(lengths), window):
        near = sorted(range(start, min(start + window, len(lengths))), key=lambda number: lengths[number])
        found += [near[at : at + size] for at in range(0, len(near), size)]
    return found


def padded(ids: list[Int[Tensor, " n"]], device: torch.device) -> dict[str, Tensor]:
    """Return texts as the inputs of a model, padded at the end."""
    longest = max(len(each) for each in ids)
    whole = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros_like(whole)
    for row, each in enumerate(ids):
        whole[row, : len(each)], mask[row, : len(each)] = each, 1
    inputs = {"input_ids": whole.to(device)}
    return inputs if bool(mask.all()) else {**inputs, "attention_mask": mask.to(device)}
