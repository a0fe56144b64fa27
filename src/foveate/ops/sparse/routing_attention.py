"""Routing attention: tokens that are near to the same centroid attend to each other.

Efficient Content-Based Sparse Attention with Routing Transformers (2020), arXiv 2003.05997.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import groups, masks, validate
from foveate.core.call import AttentionCall
from foveate.core.engines import reference
from foveate.core.errors import OptionError, ShapeError
from foveate.ops.base.grouped import Grouped
from foveate.ops.functional.heads import accumulating, per_query_head


@final
class RoutingAttention(Grouped):
    """Each centroid takes the `window` queries and the `window` keys nearest to it, and these attend to each other.

    1. A layer norm without parameters puts queries and keys on a sphere of radius `sqrt(D)`.
    2. Each of the C centroids of a head takes the queries with the largest dot products with it, in the order of the
       sequence. All clusters are equally large. A token may be in several of them, or in none.
    3. A cluster's keys are chosen in the same way. In a causal call, and with `shared_qk`, they are at the positions of
       its queries.
    4. Softmax attention of the normalized queries and keys inside each cluster. A query in several clusters returns the
       mean of those in which it sees a key; a query in none returns zeros.

    Cost O(N C D) for the choice and O(C window² D) for the attention: O(N^1.5 D) for `sqrt(N)` clusters. Centroids do
    not follow a gradient: `update` moves them, once for each training step. In a causal call later tokens influence
    which tokens a centroid takes, though no weight is on a later key; a model may learn from that, and decoding token
    by token would choose differently. The wrong choice for short sequences, and where a token must always see its
    neighbours: the paper gives half of the heads a local window.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        clusters: C.
        window: queries and keys of a cluster; None for `N / C`, rounded up.
        shared_qk: True = keys are the normalized queries, and the call's keys have no effect.
        self_mask: True = a token does not attend to itself unless it sees no other key; only with `shared_qk`.
        decay: the part of a centroid that an update keeps.
        generator: draws the centroids.

    The paper scatters without saying what happens to a query in several clusters. The release divides the sum by the
    count plus 0.01, keeps moving averages of counts and sums in place of unit centroids, and normalizes queries after
    the factor `D ** -0.5`, which undoes it: `scale=1` has its logits. A well-known port has raw queries and keys in the
    logits, and the `self_mask`; the release has none.

    Raises:
        OptionError: an option out of range, or a `self_mask` without `shared_qk`.
        ShapeError: a call of other heads or another width.
    """

    centroids: Tensor

    def __init__(
        self, heads: int, head_dim: int, clusters: int = 16, window: int | None = None, *, shared_qk: bool = False,
        self_mask: bool = False, decay: float = 0.999, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"heads": heads, "head_dim": head_dim, "clusters": clusters, "window": 1 if window is None else window}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        validate.between("decay", decay, 0, 1)
        if self_mask and not shared_qk:
            raise OptionError("self_mask=True needs shared_qk=True, since other keys are not their queries")
        self.window, self.shared_qk, self.self_mask, self.decay = window, shared_qk, self_mask, decay
        device = None if generator is None else generator.device
        drawn = torch.randn(heads, clusters, head_dim, generator=generator, device=device)
        self.register_buffer("centroids", on_sphere(drawn))
        patterns = self.capabilities.patterns - ({"cross"} if shared_qk else set())
        self._declare(patterns=patterns, growth="N²" if window is None else "N", reads_keys=not shared_qk)

    @torch.no_grad()
    def update(self, q: Float[Tensor, "b hq n d"], k: Float[Tensor, "b hkv m d"] | None = None) -> None:
        """Move each centroid towards the queries and keys that are nearest to it; call it once in a training step.

        `mu <- decay mu + (1 - decay) / 2 (sum of its queries + sum of its keys)`, then back to the sphere. A token of
        zeros has no effect. Without `k`, keys are the queries.
        """
        self._check_heads(q)
        mu = self.centroids.double()
        moved = self.decay * mu
        for x in (q, q if k is None else k):
            tokens = per_query_head(normalized(x), mu.shape[0]).double()
            nearest = F.one_hot((tokens @ mu.mT).argmax(-1), mu.shape[1]).double()
            moved = moved + (1 - self.decay) / 2 * torch.einsum("bhnc,bhnd->hcd", nearest, tokens)
        self.centroids.copy_(on_sphere(moved))

    @torch.no_grad()
    def start(self, x: Float[Tensor, "b h n d"], generator: torch.Generator | None = None) -> None:
        """Put the centroids at tokens that are drawn from `x`: queries, or keys of any number of heads.

        Raises:
            ShapeError: fewer tokens than clusters.
        """
        heads, count, _ = self.centroids.shape
        tokens = per_query_head(normalized(x), heads).transpose(0, 1).flatten(1, 2)
        if tokens.shape[1] < count:
            raise ShapeError(f"x must have at least {count} tokens, one for each cluster; got {tokens.shape[1]}")
        device = tokens.device if generator is None else generator.device
        drawn = torch.rand(heads, tokens.shape[1], generator=generator, device=device).argsort(-1)[:, :count]
        self.centroids.copy_(tokens.gather(1, drawn.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2])))

    def pairs(self, n_queries: int, n_keys: int, causal: bool) -> float:
        tall, wide = self._width(n_queries), self._width(n_keys)
        return self.centroids.shape[1] * (tall * (tall + 1) / 2 if causal else tall * wide)

    def selection_macs(self, call: AttentionCall) -> int:
        (b, h, nq, d), same = call.q.shape, call.causal or self.shared_qk
        return b * h * self.centroids.shape[1] * d * (nq + (0 if same else call.n_keys))

    def reference_macs(self, call: AttentionCall, visible: float) -> float:
        return visible * (self.centroids.shape[1] * call.q.shape[3] + call.v.shape[3])

    def _clusters(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hkv m d"], mask: Tensor | None = None,
        causal: bool = False,
    ) -> tuple[Int[Tensor, "b h c w"], Int[Tensor, "b h c v"]]:  # fmt: skip
        """Return the positions of the queries and of the keys of each cluster, both in order."""
        hidden = None if mask is None else ~masks.visible(mask)
        if causal or self.shared_qk:
            queries = self._nearest(q, hidden)
            return queries, queries
        return self._nearest(q, None), self._nearest(k, hidden)

    def _nearest(self, x: Tensor, hidden: Tensor | None) -> Int[Tensor, "b h c w"]:
        """Return the positions of the tokens that each centroid takes, in order; hidden ones come last."""
        tokens = per_query_head(normalized(x), self.centroids.shape[0])
        scores = self.centroids.to(tokens) @ tokens.detach().mT
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], masks.NEG_INF)
        return scores.topk(self._width(x.shape[2]), dim=-1).indices.sort(-1).values

    def _width(self, n: int) -> int:
        """Return the tokens that a cluster takes of `n`."""
        return min(-(-n // self.centroids.shape[1]) if self.window is None else self.window, n)

    # -- the output ----------------------------------------------------------------------------------------------------

    def _prepared(self, call: AttentionCall) -> AttentionCall:
        """Return the call with normalized queries and keys."""
        q = normalized(call.q).to(call.q.dtype)
        if self.shared_qk:
            return replace(call, q=q, k=masks.without_hidden(q, call.mask), v=call.grouped(call.v))
        return replace(call, q=q, k=normalized(call.k).to(call.q.dtype))

    def _grouped(self, call: AttentionCall) -> Tensor:
        queries, keys = self._clusters(call.q, call.k, call.mask, call.causal)
        call = self._prepared(call)
        mask = groups.mask_at(call.mask, queries, keys)
        if call.causal and (mask is not None or self.self_mask):
            mask = masks.combine(mask, keys[..., None, :] <= queries[..., None])
        if self.self_mask:
            mask = _without_self(mask, keys[..., None, :] == queries[..., None])
        out, counted = groups.attend(call, queries, keys, mask, call.causal and mask is None)
        return groups.mean(out, queries, counted, call.n_queries)

    def _whole(self, call: AttentionCall) -> Tensor:
        queries, keys = self._clusters(call.q, call.k, call.mask, call.causal)
        prepared = self._prepared(call)
        (nq, nk), device = (call.n_queries, call.n_keys), call.q.device
        both = masks.full(call.mask, call.causal, nq, nk, device)
        total, count = [], []
        for mine, theirs in zip(_members(queries, nq).unbind(2), _members(keys, nk).unbind(2), strict=True):
            inside = mine[..., None] & theirs[:, :, None]
            mask = inside if both is None else masks.combine(both, inside)
            if self.self_mask:
                mask = _without_self(mask, torch.eye(nq, dtype=torch.bool, device=device))
            assert mask is not None  # there is a cluster
            total.append(reference.weights(replace(prepared, mask=mask)))
            count.append(masks.allowed(mask).any(-1, keepdim=True))
        return torch.stack(total).sum(0) / torch.stack(count).sum(0).clamp_min(1)

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, inputs: Mapping[str, Tensor]
    ) -> None:
        super()._check(q, k, v, mask, causal, inputs)
        self._check_heads(q)

    def _check_heads(self, q: Tensor) -> None:
        heads, _, width = self.centroids.shape
        if (q.shape[1], q.shape[3]) != (heads, width):
            built, got = f"Hq={heads}, D={width}", f"Hq={q.shape[1]}, D={q.shape[3]}"
            raise ShapeError(f"RoutingAttention was built for {built}; got {got}")

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, 3, min(5, max(1, length // 2)), generator=torch.Generator().manual_seed(0))


def normalized(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """Return tokens with mean 0 and variance 1 over their channels, in float32 at least."""
    return F.layer_norm(x.to(accumulating(x.dtype)), x.shape[-1:])


def on_sphere(x: Float[Tensor, "h c d"]) -> Float[Tensor, "h c d"]:
    """Return vectors of length `sqrt(D)`, like normalized tokens."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def _members(positions: Int[Tensor, "b h c w"], n: int) -> Tensor:
    """Return which of `n` tokens each cluster has, bool `(B, H, C, N)`."""
    return positions.new_zeros(*positions.shape[:3], n, dtype=torch.bool).scatter(3, positions, True)


def _without_self(mask: Tensor | None, same: Tensor) -> Tensor:
    """Hide each token from itself unless it sees no other key."""
    seen = torch.ones_like(same) if mask is None else masks.allowed(mask)
    others = seen & ~same
    kept = others | (seen & ~others.any(-1, keepdim=True))
    both = masks.combine(mask, kept)
    assert both is not None  # `kept` is a mask
    return both
