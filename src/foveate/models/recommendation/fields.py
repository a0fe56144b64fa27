"""Rows of a table as vectors: one embedding for each field, categorical, multi-valued or numeric.

AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks (2018), arXiv 1810.11921.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.readable import known


@final
@dataclass(frozen=True)
class TabularField:
    """One field of a row.

    Args:
        name: its name.
        size: number of categories; 0 for a numeric field.
        slots: the most categories that one row may have at once; more than 1 makes the field multi-valued.
    """

    name: str
    size: int = 0
    slots: int = 1

    def __post_init__(self) -> None:
        validate.count("size", self.size, 0)
        validate.count("slots", self.slots, 1)
        if self.slots > 1 and not self.size:
            raise OptionError(f"slots={self.slots} must be 1 for the numeric field {self.name!r}, which has size=0")


@final
class FieldEmbedding(nn.Module):
    """Rows to `(B, M, C)`, a vector for each of M fields, in their order.

    A category has a vector of its own. Several categories of one field give the mean of theirs. A number gives its
    field's vector times the number. A row without a category of a field has zeros there.

    Args:
        fields: the fields.
        dim: C.
        spread: standard deviation of the first vectors.
    """

    offsets: Int[Tensor, " i"]
    counts: Int[Tensor, " i"]
    owners: Int[Tensor, " i"]
    numbers: Int[Tensor, " v"]

    def __init__(self, fields: Sequence[TabularField], dim: int, spread: float = 0.01) -> None:
        super().__init__()
        if not fields or not all(isinstance(field, TabularField) for field in fields):
            raise OptionError(f"fields={shown(fields)} must be TabularFields, one or more")
        validate.count("dim", dim, 1)
        validate.at_least("spread", spread, 0.0)
        columns, offset = list[tuple[int, int, int]](), 0
        for place, field in enumerate(fields):
            columns += [(offset, field.size, place)] * (field.slots if field.size else 0)
            offset += field.size
        numbers = [place for place, field in enumerate(fields) if not field.size]
        self.fields, self.columns = len(fields), len(columns)
        for name, values in zip(("offsets", "counts", "owners"), zip(*columns, strict=True), strict=False):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int64), persistent=False)
        self.table = nn.Parameter(spread * torch.randn(offset, dim)) if columns else None
        self.scaled = nn.Parameter(spread * torch.randn(len(numbers), dim)) if numbers else None

    def forward(self, ids: Int[Tensor, "b i"], values: Float[Tensor, "b v"] | None = None) -> Float[Tensor, "b m c"]:
        """Embed rows.

        Args:
            ids: the categories of the fields that have any, in their order, with a column for each slot; -1 for none.
            values: the numbers of the numeric fields, in their order.
        """
        self._check(ids, values)
        found = [*self._categories(ids), *self._numbers(values)]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _categories(self, ids: Tensor) -> list[Tensor]:
        if self.table is None:
            return []
        there = ids >= 0
        vectors = self.table[ids.clamp_min(0) + self.offsets].masked_fill(~there[..., None], 0.0)
        shape = (len(ids), self.fields)
        total = vectors.new_zeros(*shape, vectors.shape[-1]).index_add(1, self.owners, vectors)
        count = vectors.new_zeros(shape).index_add(1, self.owners, there.to(vectors.dtype))
        return [total / count.clamp_min(1.0)[..., None]]

    def _numbers(self, values: Tensor | None) -> list[Tensor]:
        if self.scaled is None or values is None:
            return []
        vectors = values[..., None] * self.scaled
        return [vectors.new_zeros(len(values), self.fields, vectors.shape[-1]).index_add(1, self.numbers, vectors)]

    def _check(self, ids: Tensor, values: Tensor | None) -> None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] != self.columns:
            raise ShapeError(f"ids must be int64 (B, {self.columns}), a column for each slot; got {shown(ids)}")
        if self.columns and known((ids >= self.counts).any()):
            column = int((ids >= self.counts).any(0).nonzero()[0])
            most = int(self.counts[column]) - 1
            raise OptionError(f"ids must be at most {most} in column {column}; got {int(ids[:, column].max())}")
        given = None if values is None else tuple(values.shape)
        if given != ((len(ids), len(self.numbers)) if len(self.numbers) else None):
            wanted = f"numbers (B, V)=({len(ids)}, {len(self.numbers)})" if len(self.numbers) else "None"
            raise ShapeError(f"values must be {wanted} for {len(self.numbers)} numeric fields; got {given}")
