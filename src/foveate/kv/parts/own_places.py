"""The numbers of a call's tokens in their own sequences, with one interface for batches with and without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.host.padding import Tokens, tokens
from foveate.host.site import Site


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens of each sequence before and after a call.

    Args:
        past, total: of the batch, padding included.
        before, count: of each sequence, `(B,)`.
        queries: number of each query in its own sequence, `(B, Nq)`; negative for padding.
    """

    past: int
    total: int
    before: Int[Tensor, " b"]
    count: Int[Tensor, " b"]
    queries: Int[Tensor, "b q"]
    _found: Tokens | None = None

    @classmethod
    def of(cls, site: Site) -> Places:
        total, n, batch, device = site.k.shape[2], site.q.shape[2], site.q.shape[0], site.q.device
        numbers, found = torch.arange(total - n, total, device=device).expand(batch, -1), tokens(site)
        if found is None:
            before = torch.full((batch,), total - n, device=device)
            return cls(total - n, total, before, before + n, numbers)
        own = found.own(numbers[:, None])[:, 0].long()
        return cls(total - n, total, found.before(total - n).long(), found.count.long(), own, found)

    @property
    def is_padded(self) -> bool:
        return self._found is not None

    def at(self, own: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """Convert numbers in their own sequence to numbers of keys; those out of range to any number."""
        return own.clamp(0, self.total - 1) if self._found is None else self._found.at(own).long()

    def own(self, numbers: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """Convert numbers of keys to numbers in their own sequence; negative for padding."""
        return numbers if self._found is None else self._found.own(numbers[:, None])[:, 0].long()
