"""HyperAttention: exact attention inside blocks of similar tokens, and a random sample for all other keys.

HyperAttention: Long-context Attention in Near-Linear Time (2023), arXiv 2310.05869.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import engines, groups, masks, online_softmax, validate
from foveate.core.call import AttentionCall
from foveate.core.engines import reference
from foveate.core.errors import OptionError, ShapeError
from foveate.core.online_softmax import Partial
from foveate.ops.base.grouped import Grouped
from foveate.ops.functional.heads import accumulating
from foveate.ops.functional.sorted_blocks import (
    BITS,
    SLAB,
    Segments,
    SortedBlocks,
    attend_blocks,
    block_count,
    multiplicity,
    sorted_blocks,
)


@final
class HyperAttention(Grouped):
    """Each query sees the keys of its own block of similar tokens, and a sample that stands for all other keys.

    1. The signs of `bits` random projections give each query and key a code. Codes are ordered so that neighbours
       differ in one bit.
    2. Queries and keys are sorted by code and cut into the same number of blocks, of at most `block` keys. A query sees
       the keys of the block with its number.
    3. `samples` keys are drawn for each head, uniformly and with replacement. Each stands for `Nk / samples` keys,
       which raises its logit by the log of that. A drawn key of the query's own block is left out.
    4. Both parts merge by their log-sum-exp.

    A causal call is halved: each half is a causal call, and the second half also reads the first as above. Pieces of at
    most `min_len` tokens are computed exactly. A call without causality is exact if it has fewer than `min_len`
    queries. Cost O(N (block + samples) D), in causal calls for each halving, and O(N min_len D) for the pieces.

    The large weights are found if similar queries and keys fall into the same block; a single key that matters and is
    missed costs accuracy. In a causal call a query's block depends on later queries, though no later key has a weight.
    So it suits prefill, not decoding. The wrong choice below `min_len`, where a fused kernel computes the whole matrix.

    Args:
        head_dim: D of the calls to come.
        bits: random projections.
        block: keys in a block; 0 leaves the blocks out.
        samples: drawn keys; 0 leaves the sample out. All sequences of a batch share the draw.
        min_len: see above.
        generator: draws the projections and the sample, once, when the operator is made.

    Keys that the mask hides from every query belong to no block and are not drawn. Blocks divide the others evenly
    where `block` does not divide their number. The release fills up with zeros, which keep a weight; outside half
    precision it does not leave out drawn keys of the own block; it applies the Gray code in place of its inverse, so
    that neighbours may differ in several bits; and it draws anew in every call. The paper's sampling by the norms of
    values is in neither.

    Raises:
        OptionError: an option out of range, or neither blocks nor samples.
        ShapeError: a call of another width.
    """

    capabilities = replace(Grouped.capabilities, growth="N log N")
    directions: Tensor
    draws: Tensor

    def __init__(
        self, head_dim: int, bits: int = 7, block: int = 256, samples: int = 256, min_len: int = 4096,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, least in (
            ("head_dim", head_dim, 1), ("bits", bits, 1), ("block", block, 0), ("samples", samples, 0),
            ("min_len", min_len, 1),
        ):  # fmt: skip
            validate.count(name, value, least)
        if bits > BITS:
            raise OptionError(f"bits={bits} must be at most {BITS}")
        if not block and not samples:
            raise OptionError("block=0, samples=0 must not both be 0, since a query would see no key")
        self.head_dim, self.bits, self.block, self.samples, self.min_len = head_dim, bits, block, samples, min_len
        device = None if generator is None else generator.device
        self.register_buffer("directions", torch.randn(bits, head_dim, generator=generator, device=device))
        self.register_buffer("draws", torch.randint(2**BITS, (samples,), generator=generator, device=device))

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
        scale: float | None = None,
    ) -> tuple[Float[Tensor, "b hq nq dv"], Float[Tensor, "b hq nq"]]:  # fmt: skip
        """Return the output and the log of the estimated sum of exponentiated logits; arguments as for a call."""
        call = self._call(q, k, v, mask, causal, scale)
        k, v = (masks.without_hidden(x, call.mask) for x in (k, v))
        part = self._partial(replace(call, k=k, v=v))
        return online_softmax.finish(part).to(q.dtype), online_softmax.log_sum_exp(part)

    def codes(self, x: Float[Tensor, "b h n d"]) -> Int[Tensor, "b h n"]:
        """Return the bucket of each token, in `0 .. 2 ** bits - 1`; neighbouring buckets differ in one sign."""
        wide = accumulating(x.dtype)
        signs = x.detach().to(wide) @ self.directions.to(wide).mT > 0
        code = (signs * 2 ** torch.arange(self.bits, device=x.device)).sum(-1)
        step = 1
        while step < self.bits:  # the inverse of the Gray code
            code = code ^ (code >> step)
            step *= 2
        return code

    def pairs(self, n_queries: int, n_keys: int, causal: bool) -> float:
        if self._is_exact(n_queries, n_keys, causal):
            return n_queries * (n_keys - (n_queries - 1) / 2 if causal else n_keys)
        if not causal:
            return n_queries * self._keys_read(n_keys)
        levels, piece = self._halvings(n_keys)
        halves = sum(self._keys_read(piece << level) for level in range(levels))
        return n_queries * ((piece + 1) / 2 + halves / 2)

    def selection_macs(self, call: AttentionCall) -> int:
        (b, heads, nq, d), kv_heads, nk = call.q.shape, call.k.shape[1], call.n_keys
        return b * (heads * nq + kv_heads * nk) * d * self.bits

    def _keys_read(self, n_keys: int) -> int:
        return (-(-n_keys // block_count(n_keys, self.block)) if self.block else 0) + self.samples

    def _is_exact(self, n_queries: int, n_keys: int, causal: bool) -> bool:
        return n_keys <= self.min_len if causal else n_queries < self.min_len

    def _halvings(self, n: int) -> tuple[int, int]:
        """Return the number of halvings and the length of the pieces that are left."""
        levels = 0
        while n > self.min_len:
            levels, n = levels + 1, -(-n // 2)
        return levels, n

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, inputs: Mapping[str, Tensor]
    ) -> None:
        super()._check(q, k, v, mask, causal, inputs)
        if q.shape[3] != self.head_dim:
            raise ShapeError(f"HyperAttention was built for D={self.head_dim}; got D={q.shape[3]}")

    # -- the output ----------------------------------------------------------------------------------------------------

    def _grouped(self, call: AttentionCall) -> Tensor:
        if self._is_exact(call.n_queries, call.n_keys, call.causal):
            return engines.run(replace(call, engine="auto"))
        return online_softmax.finish(self._partial(call)).to(call.q.dtype)

    def _partial(self, call: AttentionCall) -> Partial:
        """Return the partial result of all keys, for the queries in their order."""
        if not call.causal:
            (choice,) = self._choices(call)
            return attend_blocks(call, choice)
        levels, piece = self._halvings(call.n_queries)
        padded = _padded(call, piece << levels)
        part = _pieces(padded, piece)
        for level, choice in enumerate(self._choices(call)):
            part = _with_second_halves(part, attend_blocks(padded, choice), 1 << level)
        return Partial(*(x[:, :, : call.n_queries] for x in part))

    def _whole(self, call: AttentionCall) -> Tensor:
        nq, nk = call.n_queries, call.n_keys
        if self._is_exact(nq, nk, call.causal):
            return reference.weights(call)
        levels, piece = self._halvings(nk) if call.causal else (0, 1)
        longer = (piece << levels) - nk if call.causal else 0
        counts = sum(multiplicity(choice, nq + longer, nk + longer)[:, :, :nq, :nk] for choice in self._choices(call))
        if call.causal:
            number = torch.arange(nk, device=call.q.device) // piece
            counts = counts + (number[:, None] == number)
        assert isinstance(counts, Tensor)  # some call has a choice, or all of it is exact
        return reference.weights(replace(call, mask=masks.combine(call.mask, counts.log().to(call.q.dtype))))

    def _choices(self, call: AttentionCall) -> Iterator[SortedBlocks]:
        """Yield the blocks and the sample of each halving, or the only ones of a call without causality."""
        nq, nk = call.n_queries, call.n_keys
        if not call.causal:
            longer, segments = 0, [Segments(1, nq, nk)]
        else:
            levels, piece = self._halvings(nk)
            lengths = [piece << (levels - level) for level in range(levels)]
            longer = (piece << levels) - nk
            segments = [Segments(1 << i, n // 2, n // 2, n, n // 2, 1 << i) for i, n in enumerate(lengths)]
        hidden = None
        if call.mask is not None:  # tokens of padding are read by padding alone
            hidden = F.pad(~masks.visible(call.mask).expand(-1, nk), (0, longer), value=True)
        codes = (F.pad(self.codes(x), (0, longer)) for x in (call.q, call.k))
        query_codes, key_codes = codes
        block = nk if self._is_exact(nq, nk, call.causal) else self.block
        for each in segments:
            yield sorted_blocks(query_codes, key_codes, hidden, each, block, self.draws)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(head_dim, bits=3, block=2, samples=3, min_len=3, generator=torch.Generator().manual_seed(0))

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(head_dim, block=length, samples=4, min_len=1, generator=torch.Generator().manual_seed(0))


def _padded(call: AttentionCall, n: int) -> AttentionCall:
    """Return the call with tokens of zeros behind the last one, which no query before them sees."""
    q, k, v = (F.pad(x, (0, 0, 0, n - x.shape[2])) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def _pieces(call: AttentionCall, piece: int) -> Partial:
    """Return the partial result of causal attention inside pieces of the sequence, some rows of all at a time."""
    b, h, n, _ = call.q.shape
    wide, inside = accumulating(call.q.dtype), torch.arange(piece, device=call.q.device)
    q, k, v = (x.unflatten(2, (-1, piece)) for x in (call.q, call.grouped(call.k), call.grouped(call.v)))
    positions = (torch.arange(n // piece, device=call.q.device)[:, None] * piece + inside)[None, None]
    parts, step = [], max(1, SLAB // (b * h * n))
    for start in range(0, piece, step):
        stop = min(start + step, piece)
        logits = (q[:, :, :, start:stop].to(wide) * call.scale) @ k[:, :, :, :stop].to(wide).mT
        mask = groups.mask_at(call.mask, positions[..., start:stop], positions[..., :stop])
        seen = masks.combine(mask, masks.causal(stop - start, stop, device=q.device))
        parts.append(online_softmax.partial(groups.hide(logits, seen), v[:, :, :, :stop]))
    return Partial(*(torch.cat(each, 3).flatten(2, 3) for each in zip(*parts, strict=True)))


def _with_second_halves(part: Partial, more: Partial, count: int) -> Partial:
    """Merge what the second halves of `count` segments have read of the first ones into the result so far."""
    first, second = (Partial(*(x.unflatten(2, (count, 2, -1))[:, :, :, half] for x in part)) for half in (0, 1))
    second = online_softmax.merge(second, Partial(*(x.unflatten(2, (count, -1)) for x in more)))
    return Partial(*(torch.stack(both, 3).flatten(2, 4) for both in zip(first, second, strict=True)))
