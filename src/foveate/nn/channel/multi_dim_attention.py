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
    """`softmax_n(W_2 tanh(W_1 x_n + W_q q + b_1) + b_2)`, one for each feature, as the weights of a mean of the x_n.

    One token may lend its meaning in one feature and another token in the next, where a word has several senses. Holds
    `Nq N (hidden + C)` numbers: the wrong choice for long sequences that all ask.

    Args:
        dim: C, the tokens' width, and that of what comes out.
        hidden: under the tanh; C where None.
        query_dim: width of the queries; None for no query, where the tokens are pooled by themselves (source to token).

    The survey's (1904.02874) form; the additive score with a matrix for its read-out is DiSAN's (1709.04696).
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
        """Pool `x (B, N, C)` for each query `(B, Nq, E)`: `(B, Nq, C)`, with Nq = 1 where there is none.

        Args:
            mask: True where a token is real.
        """
        self._check(x, query, mask)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        return (self.weights(x, query, mask=mask) * x[:, None]).sum(2)

    def weights(
        self, x: Float[Tensor, "b n c"], query: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Float[Tensor, "b q n c"]:
        keys = self.keys(x)
        hidden = keys[:, None] if self.queries is None else pairs(self.queries(query), keys)
        logits = self.read_out(torch.tanh(hidden)).mT
        return safe_softmax(logits if mask is None else logits.masked_fill(~mask[:, None, None], masks.NEVER)).mT

    def _check(self, x: Tensor, query: Tensor | None, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x must be (B, N, C={self.dim}); got {tuple(x.shape)}")
        if (query is None) != (self.query_dim is None):
            raise ShapeError(f"built for query_dim={self.query_dim}; got {'no' if query is None else 'a'} query")
        if query is not None and (query.dim() != 3 or query.shape[::2] != (x.shape[0], self.query_dim)):
            raise ShapeError(f"query must be (B={x.shape[0]}, Nq, {self.query_dim}); got {tuple(query.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ShapeError(f"mask must be bool {tuple(x.shape[:2])}; got {mask.dtype} {tuple(mask.shape)}")
