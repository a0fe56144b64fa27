"""Statistics of softmax attention from fused kernels, in O(N) memory: the weight matrix is never materialised.

*Row statistics* are value columns: attention with features of the keys as values gives each query's mean feature, and
the kernel also returns its log-sum-exp. *Column statistics* swap the roles: if the keys attend to the queries with
each query's `-lse` as a bias, the exponential of a key's log-sum-exp is the mass that it receives. Under causality both
sequences are reversed, because a key is seen by later queries only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.engines.fused import FEW
from foveate.host.hf.mask import MaskPlan, is_given
from foveate.host.one_pass import RowsAndColumns, one_pass
from foveate.host.site import Site

#: A bias that hides a key. It is finite, since kernels differ on rows of only -inf; no logit reaches half of it.
HIDDEN = -1e30
#: Keys whose logits are held together.
_TOGETHER = 16


def statistics(
    q: Tensor, k: Tensor, columns: Tensor, *, scale: float, causal: bool = False, key_mask: Tensor | None = None
) -> tuple[Float[Tensor, "b hq nq"], Float[Tensor, "b hq nq c"]]:
    """Return each query's log-sum-exp, and its mean of `columns (B, Hkv, Nk, C)` under the attention weights.

    A query that sees no key gets -inf and zeros. Cost: one fused attention with values as wide as `columns`.

    Args:
        q, k: `(B, Hq, Nq, D)` and `(B, Hkv, Nk, D)`, float32 or float64, finite.
        scale: the factor of the logits.
        causal: True for a causal mask that aligns the last query with the last key.
        key_mask: bool `(B, Nk)`, True for keys that may be attended to.
    """
    bias = None if key_mask is None else torch.where(key_mask, 0.0, HIDDEN)[:, None]
    parts = []
    for keys, square in _spans(q.shape[2], k.shape[2], causal):
        part_bias = None if bias is None else bias[..., keys]
        parts.append(_attend(q, k[:, :, keys], columns[:, :, keys], scale, square, part_bias))
    lse, mean = parts[0]
    for other_lse, other_mean in parts[1:]:
        both = torch.logaddexp(lse, other_lse)
        mean = mean * (lse - both).exp()[..., None] + other_mean * (other_lse - both).exp()[..., None]
        lse = both
    empty = lse < HIDDEN / 2
    return lse.masked_fill(empty, float("-inf")), mean.masked_fill(empty[..., None], 0.0)


def received(
    q: Tensor, k: Tensor, lse: Float[Tensor, "b hq nq"], *, scale: float, causal: bool = False,
    query_mask: Tensor | None = None, key_mask: Tensor | None = None,
) -> Float[Tensor, "b hq nk"]:  # fmt: skip
    """Return the mass that each key receives: its column sum of attention weights, over all queries or some.

    Args:
        q, k, scale, causal, key_mask: the arguments of `statistics`, which returned `lse`.
        query_mask: bool `(B, Nq)`, True for queries whose rows count.
    """
    counted = lse > float("-inf") if query_mask is None else query_mask[:, None] & (lse > float("-inf"))
    bias = torch.where(counted, -lse, HIDDEN)
    k, sums = grouped(k, q.shape[1]), []
    for keys, square in _spans(q.shape[2], k.shape[2], causal):
        some = k[:, :, keys]
        if square:  # in reversed order a key's later queries are earlier ones
            total = _attend(some.flip(2), q.flip(2), q.flip(2), scale, True, bias.flip(2))[0].flip(2)
        else:
            total = _attend(some, q, q, scale, False, bias)[0]
        sums.append(total.exp())
    mass = torch.cat(sums, 2)
    return mass if key_mask is None else mass.masked_fill(~key_mask[:, None], 0.0)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of one attention call; each is computed on first access.

    Args:
        q, k, scale, causal, key_mask: see `statistics`.
        query_mask: bool `(B, Nq)`, False for padding, whose rows do not count.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool
    key_mask: Bool[Tensor, "b nk"] | None = None
    query_mask: Bool[Tensor, "b nq"] | None = None

    @classmethod
    def of(cls, site: Site) -> Self | None:
        """Return the statistics of a site, or None if it did more than softmax with causality and padding."""
        edited = (
            site.replaced
            or site.weights is not None
            or site.selections
            or site.softcap is not None
            or site.is_biased
            or site.hidden_keys is not None
        )
        if edited or not site.is_whole or not has_kernel(site.q):
            return None
        plan, real, n = site.attention_mask, site.real, site.k.shape[2]
        if is_given(plan):
            return None
        rule = plan.rule() if isinstance(plan, MaskPlan) else "causal" if site.is_causal else "full"
        if rule is None or (rule == "causal" and n < site.q.shape[2]):
            return None
        keys = None
        if isinstance(plan, MaskPlan):
            if plan.n_keys != n:
                return None
            keys = None if real is None else real[:, plan.first_key :]
        queries = site.real_queries
        q, k = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (site.q, site.k))
        # padding may hold NaN
        q = q if queries is None else q.masked_fill(~queries[:, None, :, None], 0.0)
        k = k if keys is None else k.masked_fill(~keys[:, None, :, None], 0.0)
        return cls(q, k, site.scale, rule == "causal", keys, queries)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        return statistics(self.q, self.k, self.k, scale=self.scale, causal=self.causal, key_mask=self.key_mask)

    @cached_property
    def _all(self) -> RowsAndColumns:
        return one_pass(
            self.q, self.k, scale=self.scale, causal=self.causal, key_mask=self.key_mask, query_mask=self.query_mask
        )

    @property
    def _by_tiles(self) -> bool:
        """True where one pass over the logits is cheaper than the kernel with other values.

        Its many small operations gain nothing from more threads, and the kernel does.
        """
        return self.q.device.type == "cpu" and self.q.shape[2] > FEW and torch.get_num_threads() == 1

    @cached_property
    def lse(self) -> Float[Tensor, "b hq nq"]:
        if "_all" in self.__dict__:
            return self._all.lse
        return self._rows[0]

    @cached_property
    def mean_logit(self) -> Float[Tensor, "b hq nq"]:
        """Each query's mean logit under its weights."""
        return self._all.mean_logit if self._by_tiles else self.scale * (self.q * self._rows[1]).sum(-1)

    @cached_property
    def mean_place(self) -> Float[Tensor, "b hq nq"]:
        """Each query's mean key index under its weights."""
        if self._by_tiles:
            return self._all.mean_key
        index = torch.arange(self.k.shape[2], device=self.k.device, dtype=self.k.dtype)
        return self.mean_of("place", lambda: index[None, None, :, None])[..., 0]

    @cached_property
    def counted(self) -> Bool[Tensor, "b 1 nq"]:
        """The queries whose rows count: those that are not padding and see a key."""
        sees = self.lse[:, :1] > float("-inf")
        return sees if self.query_mask is None else sees & self.query_mask[:, None]

    @cached_property
    def received(self) -> Float[Tensor, "b hq nk"]:
        if self._by_tiles:
            mass = self._all.received
            return mass if self.key_mask is None else mass.masked_fill(~self.key_mask[:, None], 0.0)
        return received(
            self.q, self.k, self.lse, scale=self.scale, causal=self.causal,
            query_mask=self.query_mask, key_mask=self.key_mask,
        )  # fmt: skip

    @cached_property
    def visible(self) -> Float[Tensor, "b 1 nk"]:
        """The number of counted queries that see each key."""
        counted, n = self.counted.to(self.q.dtype), self.k.shape[2]
        if self.causal:
            past = n - counted.shape[2]
            now = counted.flip(2).cumsum(2).flip(2)
            seen = torch.cat([now[..., :1].expand(-1, -1, past), now], 2)
        else:
            seen = counted.sum(-1, keepdim=True).expand(-1, -1, n)
        return seen if self.key_mask is None else seen.masked_fill(~self.key_mask[:, None], 0.0)

    @cached_property
    def _means(self) -> dict[Hashable, Tensor]:
        return {}

    def mean_of(
        self, name: Hashable, columns: Callable[[], Float[Tensor, "#b #hkv nk c"]]
    ) -> Float[Tensor, "b hq nq c"]:
        """Return each query's mean of some columns of the keys, in one pass of the kernel; the same name shares it."""
        if name not in self._means:
            made = columns().expand(*self.k.shape[:3], -1)
            _, mean = statistics(self.q, self.k, made, scale=self.scale, causal=self.causal, key_mask=self.key_mask)
            self._means[name] = mean
        return self._means[name]

    def mass_on(self, chosen: Bool[Tensor, "b nk"]) -> Float[Tensor, "b hq nq"]:
        """Return the mass that each query puts on some chosen keys together, from their logits and the log-sum-exp."""
        count = int(chosen.sum(-1).max())
        index = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[:, :count]
        total = torch.zeros_like(self.lse)
        for some in index.split(_TOGETHER, 1):
            total = total + self._mass_on(chosen, some)
        return total

    def _mass_on(self, chosen: Bool[Tensor, "b nk"], index: Int[Tensor, "b c"]) -> Float[Tensor, "b hq nq"]:
        """Return the mass on those of the keys at `index` that are chosen."""
        seen = chosen.gather(1, index) if self.key_mask is None else (chosen & self.key_mask).gather(1, index)
        seen = seen[:, None, None]
        if self.causal:
            last = torch.arange(self.q.shape[2], device=self.q.device) + self.k.shape[2] - self.q.shape[2]
            seen = seen & (index[:, None, None] <= last[:, None])
        keys = self.k.gather(2, index[:, None, :, None].expand(-1, self.k.shape[1], -1, self.k.shape[3]))
        logits = self.scale * self.q @ grouped(keys, self.q.shape[1]).mT
        weights = torch.where(seen & self.counted[..., None], (logits - self.lse[..., None]).exp(), 0.0)
        return weights.sum(-1)


def grouped(x: Tensor, heads: int) -> Tensor:
    """Repeat grouped key heads, so that each query head has its own."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _spans(n_queries: int, n_keys: int, causal: bool) -> list[tuple[slice, bool]]:
    """Split the keys into those that every query sees and the queries' own, whose causal mask is square."""
    past = n_keys - n_queries if causal and n_queries > 1 else n_keys
    spans = [(slice(0, past), False), (slice(past, n_keys), True)]
    return [(keys, square) for keys, square in spans if keys.stop > keys.start]


def has_kernel(q: Tensor) -> bool:
    """Return True if the device has a fused kernel that returns its log-sum-exp."""
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype != torch.float64)


def _attend(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and mean columns of one kernel call; `bias (B, 1 or Hq, Nk)` is added to a key's logits."""
    n, width = q.shape[2], columns.shape[3]
    if q.device.type == "cpu":
        q, k, columns = _pad_width(max(q.shape[3], width), q, k, columns)  # this kernel needs equal widths
        mask = None if bias is None else bias[:, :, None].to(q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, columns, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        q, k, columns = q * scale, grouped(k, q.shape[1]), grouped(columns, q.shape[1])
        q, k = (q, k) if bias is None else with_bias(q, k, bias)
        q, k = _pad_width(-(-q.shape[3] // 8) * 8, q, k)  # this kernel needs widths that are multiples of 8
        (columns,) = _pad_width(-(-width // 8) * 8, columns)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, columns, None, True, 0.0, causal, scale=1.0
        )
    return lse[..., :n], out[..., :width]


def with_bias(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Extend queries and keys by a channel that adds a key's bias to its logits, for kernels without a mask."""
    bias = bias.expand(*k.shape[:3]).to(k.dtype)
    return torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, bias[..., None]], -1)


def _pad_width(width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in tensors)
