"""Sparsifiner: a small predictor chooses, for each query of each image, the keys that attention reads.

Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023), arXiv 2303.13755.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import engines, validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, ShapeError
from foveate.core.selection import Indices
from foveate.nn.base.layer import Layer
from foveate.nn.parts.heads import merge, split
from foveate.ops.dense.softmax import Softmax


class AttentionMaps(NamedTuple):
    """Two maps of the attention of an image's patches, `(B, H, N - prefix, N)`: predicted, and full attention."""

    predicted: Float[Tensor, "b h n m"]
    full: Float[Tensor, "b h n m"]


@final
class ConnectivityPredictor(nn.Module):
    """`C B`: a map of attention of low rank, from m coefficients for each query and m basis rows over all keys.

        C = softmax(q' (Pᵀ k')ᵀ · scale)       q', k' of `d / reduce_c` channels, P of `N x m`, m = N / reduce_n

    To learn it, C and B are used as they are. To predict with it, C has its `topk` largest entries only, and B the
    absolute values above `threshold`. Cost O(N m d) for C and O(N topk) for each row of the map.
    """

    def __init__(
        self, head_dim: int, num_tokens: int, reduce_n: int, reduce_c: int, threshold: float, topk: int, scale: float
    ) -> None:
        super().__init__()
        rank, width = num_tokens // reduce_n, head_dim // reduce_c
        self.q, self.k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.compress, self.basis = (nn.Parameter(torch.empty(num_tokens, rank)) for _ in range(2))
        for weight in (self.compress, self.basis):
            nn.init.trunc_normal_(weight, std=0.02)
        self.threshold, self.topk, self.scale = threshold, min(topk, rank), scale

    def coefficients(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n r"]:
        compressed = self.compress.mT @ self.k(k)
        return (self.q(q) @ compressed.mT * self.scale).softmax(-1)

    def forward(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """Return the map to learn."""
        return self.coefficients(q, k) @ self.basis.mT

    @torch.no_grad()
    def predict(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n m"]:
        """Return the map to choose keys by."""
        kept = self.coefficients(q, k).topk(self.topk)
        basis = F.threshold(self.basis.abs(), self.threshold, 0.0).mT.contiguous()
        rows = kept.indices.flatten(0, -2), kept.values.flatten(0, -2)
        found = F.embedding_bag(rows[0], basis, per_sample_weights=rows[1], mode="sum")
        return found.unflatten(0, kept.values.shape[:-1])


@final
class SparsifinerAttention(Layer):
    """Multi-head attention in which each patch reads `ceil(keep_rate N)` keys, which a predictor chooses.

    A class token reads all keys, and all patches may read it. The choice has no gradient. So there are two phases of
    training, from a trained network and a copy of it as the teacher: after `learn_connectivity()` attention is full and
    the predictor learns the teacher's maps, `maps`; after `learn_connectivity(False)`, as at first, attention is sparse
    and the predictor is fixed. `foveate.train.sparsifiner_loss` is the loss of both. Cost O(N keep C) for attention and
    O(N² (C / (reduce_n reduce_c) + coef_topk H)) for the choice. Images have one size, N tokens. The wrong choice
    without a trained network to start from, and for few tokens, where the choice costs more than it saves.

    Args:
        dim, heads: C and H, a divisor of C.
        num_tokens: N, the class token included.
        keep_rate: share of the keys that a patch reads. 1 is full attention.
        reduce_n: N divided by the rank of the predicted map. The release has 6, and 8 by default.
        reduce_c: width of a head divided by that of the predictor.
        basis_threshold: smaller entries of the basis count as zero in predictions.
        coef_topk: coefficients of each patch that count in predictions.
        prefix: class tokens at the front.
        threshold: a patch reads the keys above this value of the predicted map (the release has 1e-4), however many
            these are; one that has none gives zeros. None for `keep_rate`.
        coef_scale: factor on the predictor's dot products; None for the release's `H ** -0.5`.
        bias: True gives queries, keys and values biases. The output projection has one.

    Raises:
        OptionError: an option out of range.

    The release computes with whole masked matrices; here what is not chosen is not read. Its dropping of tokens by the
    class token's attention is left out. On digits of 17 tokens the chosen keys hold half more of full attention than
    random ones, but after the second phase a network with fixed random keys is as accurate.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset())

    def __init__(
        self, dim: int, heads: int, num_tokens: int, keep_rate: float = 0.25, reduce_n: int = 6, reduce_c: int = 2,
        basis_threshold: float = 0.02, coef_topk: int = 8, *, prefix: int = 1, threshold: float | None = None,
        coef_scale: float | None = None, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        validate.count("prefix", prefix)
        validate.count("num_tokens", num_tokens, prefix + 1)
        for name, value, most in (("reduce_n", reduce_n, num_tokens), ("reduce_c", reduce_c, dim // heads)):
            validate.count(name, value, 1)
            if value > most:
                raise OptionError(f"{name}={value} must be at most {most}")
        validate.count("coef_topk", coef_topk, 1)
        validate.between("keep_rate", keep_rate, 0.0, 1.0)
        validate.at_least("basis_threshold", basis_threshold, 0.0)
        validate.at_least("threshold", 0.0 if threshold is None else threshold, 0.0)
        self.num_tokens, self.prefix, self.threshold = num_tokens, prefix, threshold
        self.keep = max(1, math.ceil(keep_rate * num_tokens - 1e-9))
        self.qkv, self.out, self.op = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim), Softmax()
        scale = validate.scale(coef_scale, heads)
        self.predictor = ConnectivityPredictor(
            dim // heads, num_tokens, reduce_n, reduce_c, basis_threshold, coef_topk, scale
        )  # fmt: skip
        self.learn_connectivity(False)

    def learn_connectivity(self, on: bool = True) -> Self:
        """Attend to all keys and let the predictor learn; False for sparse attention and a fixed predictor."""
        validate.flag("on", on)
        self.learning = on
        self.predictor.requires_grad_(on)
        return self

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        q, k, v = self._heads(x)
        if self.learning or (self.threshold is None and self.keep >= self.num_tokens):
            return self.out(merge(self.op(q, k, v)))
        first, patches = q.split([self.prefix, self.num_tokens - self.prefix], 2)
        chosen = self._choose(patches, k)
        call = AttentionCall(patches, k, v, q.shape[-1] ** -0.5, selected=chosen)
        return self.out(merge(torch.cat([self.op(first, k, v), engines.run(call)], 2)))

    def _choose(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"]) -> Indices:
        predicted, few, valid = self.predictor.predict(q, k), self.keep, None
        if self.threshold is not None:
            few = max(1, int((predicted > self.threshold).sum(-1).max()))
        best = predicted.topk(few)
        if self.threshold is not None:
            valid = best.values > self.threshold
        return Indices(best.indices, q.shape[2], k.shape[2], valid)

    def maps(self, x: Float[Tensor, "b n c"]) -> AttentionMaps:
        """Return the map that the predictor learns, with its gradient, and the map of full attention."""
        q, k, _ = self._heads(x)
        patches = q[:, :, self.prefix :]
        return AttentionMaps(self.predictor(patches, k), self.op.weights(patches, k))

    def chosen(self, x: Float[Tensor, "b n c"]) -> Bool[Tensor, "b h n m"]:
        """Return the keys that each token reads, `(B, H, N, N)`."""
        q, k, _ = self._heads(x)
        patches = q[:, :, self.prefix :]
        dense = self._choose(patches, k).dense()
        return F.pad(dense, (0, 0, self.prefix, 0), value=True)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[1] != self.num_tokens:
            raise ShapeError(f"x must have num_tokens={self.num_tokens} tokens; got {x.shape[1]}")
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return q, k, v

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        made = cls(dim, heads, length, 0.3, 2, coef_topk=2)
        for weight in made.predictor.parameters():
            nn.init.normal_(weight, std=2.0)
        return made
