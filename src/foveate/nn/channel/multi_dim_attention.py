"""Multi-dimensional attention: a weight for each feature of each token."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import ShapeError
from foveate.core.scoring import safe_softmax
from foveate.ops.functional.additive_score import pairs


@final
class MultiDimAttention(nn.Module):
    """A mean of the x_n with weights `softmax_n(W_2 tanh(W_1 x_n + W_q q + b_1) + b_2)`, one for each feature.

    One feature may come from one token and the next from another, for words with several senses. It holds
    `Nq N (hidden + C)` numbers: the wrong choice for long sequences with as many queries.

    Args:
        dim: C, the width of tokens and outputs.
        hidden: hidden width under the tanh; None for C.
        query_dim: width of the queries; None pools the tokens without a query (source to token).

    The form is the survey's (1904.02874); the additive score with a matrix for its read-out is DiSAN's (1709.04696).
    """

    def __init__(self, dim: int, hidden: int | None = None, query_dim: int | None = None) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        validate.count("dim", dim, 1)
        validate.count("hidden", hidden, 1)
        if query_dim is not None:
            validate.count("query_dim", query_dim, 1)
        self.dim, self.query_dim = dim, query_dim
        self.keys, self.read_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.queries = None if query_dim is None else nn.Linear(query_dim, hidden, bias=False)

    def forward(
        self, x: Float[Tensor, "b n c"], query: Float[Tensor, "b q e"] | None = None, *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b q c"]:  # fmt: skip
        """Pool `x (B, N, C)` for each query `(B, Nq, E)` to `(B, Nq, C)`; Nq is 1 without a query.

        Args:
            mask: True where a token is real.
        """
        self._check(x, query, mask)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        return (self._weights(x, query, mask) * x[:, None]).sum(2)

    def weights(
        self, x: Float[Tensor, "b n c"], query: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Float[Tensor, "b q n c"]:
        """Return the weights of such a call: over the tokens, for each query and feature."""
        self._check(x, query, mask)
        return self._weights(x, query, mask)

    def _weights(self, x: Tensor, query: Tensor | None, mask: Tensor | None) -> Float[Tensor, "b q n c"]:
        keys = self.keys(x)
        hidden = keys[:, None] if self.queries is None else pairs(self.queries(query), keys)
        logits = self.read_out(torch.tanh(hidden)).mT
        return safe_softmax(logits if mask is None else logits.masked_fill(~mask[:, None, None], masks.NEG_INF)).mT

    def _check(self, x: Tensor, query: Tensor | None, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x must be (B, N, C={self.dim}); got {tuple(x.shape)}")
        if (query is None) != (self.query_dim is None):
            raise ShapeError(f"built for query_dim={self.query_dim}; got {'no' if query is None else 'a'} query")
        if query is not None and (query.dim() != 3 or query.shape[::2] != (x.shape[0], self.query_dim)):
            raise ShapeError(f"query must be (B={x.shape[0]}, Nq, {self.query_dim}); got {tuple(query.shape)}")
        if mask is not None:
            validate.bool_mask("mask", mask, "B, N", tuple(x.shape[:2]), x.device)
