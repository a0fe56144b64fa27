"""Attention to chunks that each query and head chose, with another turn of the query for each chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import masks
from foveate.core.scoring import safe_softmax
from foveate.host.attention import soft_capped


@dataclass(frozen=True, eq=False)
class ChosenChunks:
    """The chunks that queries read.

    Args:
        chosen, valid: numbers of chunks `(B, Hq, T, n)`, and which of them count.
        own: numbers of the queries in their sequence, `(B, T)`.
        width: tokens in a chunk.
        scale, softcap: of the logits.
        mask: the call's mask for these queries, `(B or 1, 1 or Hq, T, S)`; None if only later keys are hidden.
    """

    chosen: Int[Tensor, "b hq t n"]
    valid: Bool[Tensor, "b hq t n"]
    own: Int[Tensor, "b t"]
    width: int
    scale: float
    softcap: float | None = None
    mask: Tensor | None = None

    def by_query(
        self, q: Float[Tensor, "b hq t n d"], k: Tensor, v: Tensor, at: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "b hq t d"]:
        """Gather each query's keys: best for few queries.

        Args:
            q: the query for each of its chunks.
            k, v: all keys and values, `(B, Hkv, S, D)`.
            at: converts numbers in their own sequence to numbers of keys.
        """
        numbers = self.chosen[..., None] * self.width + torch.arange(self.width, device=q.device)
        index = at(numbers.flatten(1)).view_as(numbers)
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None, None]
        head = torch.arange(q.shape[1], device=q.device)[:, None, None, None] // (q.shape[1] // k.shape[1])
        keys, values = (x[batch, head, index] for x in (k, v))
        logits = soft_capped((q[..., None, :] @ keys.mT)[..., 0, :] * self.scale, self.softcap)
        seen = self.valid[..., None] & (numbers <= self.own[:, None, :, None, None])
        if self.mask is not None:
            # keys after the last query are not in its mask; they are hidden in any case
            places = index.clamp_max(self.mask.shape[3] - 1).flatten(3)
            given = self.mask.expand(*q.shape[:3], -1).gather(3, places).view_as(logits)
            logits = logits if given.dtype == torch.bool else logits + given
            seen = seen & masks.allowed(given)
        weights = safe_softmax(logits.masked_fill(~seen, masks.NEG_INF).flatten(3).float()).to(v.dtype)
        return (weights[..., None, :] @ values.flatten(3, 4))[..., 0, :]

    def by_chunk(self, q: Float[Tensor, "b hq t n d"], k: Tensor, v: Tensor) -> Float[Tensor, "b hq t d"]:
        """Gather each chunk's queries, in a batch without padding: no key is copied. The host waits for the device."""
        b, hq, t, n = self.chosen.shape
        chunks = -(-k.shape[2] // self.width)
        out = torch.empty(b, hq, t, v.shape[3], dtype=v.dtype, device=v.device)
        for row in range(b):
            for head in range(hq):
                number = self.chosen[row, head].masked_fill(~self.valid[row, head], chunks).flatten()
                counts = number.bincount(minlength=chunks + 1).tolist()[:chunks]
                pairs = number.argsort(stable=True).split([*counts, number.numel() - sum(counts)])[:chunks]
                kv = head // (hq // k.shape[1])
                out[row, head] = self._head(q[row, head].flatten(0, 1), k[row, kv], v[row, kv], pairs, (row, head))
        return out

    def _head(
        self, q: Tensor, k: Tensor, v: Tensor, pairs: tuple[Tensor, ...], at: tuple[int, int]
    ) -> Float[Tensor, "t d"]:
        """Attend chunk by chunk for one head, and combine each query's parts by their masses."""
        t, n = self.chosen.shape[2:]
        wide = torch.promote_types(q.dtype, torch.float32)
        part = torch.zeros(t * n, v.shape[1], dtype=wide, device=v.device)
        mass = torch.full((t * n,), masks.NEG_INF, dtype=wide, device=v.device)
        for number, some in enumerate(pairs):
            if not some.numel():
                continue
            keys = slice(number * self.width, (number + 1) * self.width)
            logits = soft_capped(q[some] @ k[keys].T * self.scale, self.softcap).to(wide)
            logits = self._hidden(logits, some // n, number, at)
            total = logits.logsumexp(-1, keepdim=True)
            mass[some] = total[:, 0]
            part[some] = (logits - total).exp().nan_to_num(0.0) @ v[keys].to(wide)
        weights = safe_softmax(mass.view(t, n))
        return (weights[:, None] @ part.view(t, n, -1))[:, 0].to(v.dtype)

    def _hidden(self, logits: Tensor, query: Tensor, number: int, at: tuple[int, int]) -> Tensor:
        """Hide later keys, and those that the mask hides, from the queries of one chunk."""
        first, (row, head) = number * self.width, at
        key = torch.arange(first, first + logits.shape[1], device=logits.device)
        if self.mask is not None:
            mask = self.mask[row if self.mask.shape[0] > 1 else 0, head if self.mask.shape[1] > 1 else 0]
            given = mask[query][:, key.clamp_max(mask.shape[1] - 1)]
            logits = logits if given.dtype == torch.bool else logits + given
            logits = logits.masked_fill(~masks.allowed(given), masks.NEG_INF)
        return logits.masked_fill(key > self.own[row, query][:, None], masks.NEG_INF)
