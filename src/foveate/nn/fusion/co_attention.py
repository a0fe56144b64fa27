"""Co-attention: two sequences attend to each other over one matrix of affinities."""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.scoring import safe_softmax
from foveate.nn.base.fusion import Fusion, Stream


@final
class CoAttention(Fusion):
    """`C = a W bᵀ`: the softmax of its rows reads b for each token of a; that of its columns reads a for each of b.

    It suits pairs such as question and image, or premise and hypothesis; O(N M) time and memory. The wrong choice if
    only one side has queries: cross attention is half of it. With `pool` each side is read once: a token's logit is its
    largest (or mean) affinity, and each side becomes one vector. An example that lacks a side gets zeros on both.

    Args:
        dim: width of a's tokens.
        other_dim: width of b's tokens; None for `dim`.
        pool: "max" or "mean" for one vector a side, None for one vector a token.
        activation: the activation of the affinities: "tanh" (as for images and questions), or None.

    Streams are a `(B, N, C)` and b `(B, M, E)`. The output a is `(B, N, E)`, read from b, and b `(B, M, C)`, read from
    a, zeros for padding; with `pool` they are the summaries `(B, C)` of a and `(B, E)` of b.

    The form is the survey's (1904.02874); the activation is an option because the survey's examples differ.
    """

    def __init__(
        self, dim: int, other_dim: int | None = None, *, pool: Literal["max", "mean"] | None = None,
        activation: Literal["tanh"] | None = None,
    ) -> None:  # fmt: skip
        other_dim = dim if other_dim is None else other_dim
        validate.count("dim", dim, 1)
        validate.count("other_dim", other_dim, 1)
        streams = Stream("a", dim), Stream("b", other_dim, ("M",))
        read = Stream("a", other_dim), Stream("b", dim, ("M",))
        summaries = Stream("a", dim, ()), Stream("b", other_dim, ())
        super().__init__(streams, read if pool is None else summaries)
        self.pool, self.activation = pool, activation
        self.weight = nn.Parameter(torch.empty(dim, other_dim).uniform_(-(dim**-0.5), dim**-0.5))

    @classmethod
    def example(cls) -> Self:
        return cls(6, 5)

    def _fuse(self, x: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = x["a"], x["b"]
        affinity = a @ self.weight @ b.mT
        affinity = torch.tanh(affinity) if self.activation else affinity
        both = real["a"][:, :, None] & real["b"][:, None, :]
        if self.pool is None:
            affinity = affinity.masked_fill(~both, masks.NEG_INF)
            return {"a": safe_softmax(affinity) @ b, "b": safe_softmax(affinity.mT) @ a}
        return {"a": self._summary(affinity, both, a), "b": self._summary(affinity.mT, both.mT, b)}

    def _summary(self, affinity: Tensor, both: Tensor, tokens: Tensor) -> Float[Tensor, "b c"]:
        if self.pool == "max":
            logits = affinity.masked_fill(~both, masks.NEG_INF).amax(-1)
        else:
            met = both.sum(-1)
            logits = (affinity.masked_fill(~both, 0.0).sum(-1) / met).masked_fill(met == 0, masks.NEG_INF)
        return (safe_softmax(logits)[:, None] @ tokens).squeeze(1)
