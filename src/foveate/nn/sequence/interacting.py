"""AutoInt's interacting layer: each field of a row attends to all fields, and keeps itself by a residual.

AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks (2018), arXiv 1810.11921.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.scoring import dot_product, safe_softmax
from foveate.nn.base.layer import Layer


@final
class InteractingLayer(Layer):
    """`relu(heads(x) + x W_res)`, where a head is `softmax(x W_q (x W_k)ᵀ) x W_v`: no scale, no biases, no positions.

    A layer's product of fields is of one order more than its input, and the residual keeps the lower orders. Permuted
    fields give permuted outputs. Cost O(M²) for M fields; the matrix of weights is always made. The wrong choice for
    long sequences.

    Args:
        dim: C, the width of a field.
        heads: H.
        units: width of a head; the output is `heads * units` wide.
        residual: False leaves `x W_res` out.
        dropout: share of weights that training drops. The release's scripts drop none.
        variant: "release" has biases and ReLUs on queries, keys, values and residual, divides logits by `units ** 0.5`,
            and normalizes its output (LayerNorm).
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset({"keys"}))

    def __init__(
        self, dim: int, heads: int = 2, units: int = 32, *, residual: bool = True, dropout: float = 0.0,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("units", units, 1)
        validate.between("dropout", dropout, 0.0, 1.0)
        released, width = variant == "release", heads * units
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=released) for _ in range(3))
        self.residual = nn.Linear(dim, width, bias=released) if residual else None
        self.norm = nn.LayerNorm(width, eps=1e-8) if released else None
        self.dropout, self.scale = dropout, units**-0.5 if released else 1.0

    def weights(self, x: Float[Tensor, "b m c"], mask: Tensor | None = None) -> Float[Tensor, "b h m m"]:
        """Return each head's weights: of the fields in columns for the fields in rows."""
        self._check(x, None, mask, False, None, {})
        return self._weights(*self._without_hidden(x, mask))

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        x, seen = self._without_hidden(x, mask)
        weights = F.dropout(self._weights(x, seen), self.dropout, self.training)
        out = (weights @ self._heads(self.v, x)).transpose(1, 2).flatten(2)
        if self.residual is not None:
            out = out + self._activated(self.residual(x))
        return F.relu(out) if self.norm is None else self.norm(F.relu(out))

    def _weights(self, x: Tensor, seen: Tensor | None) -> Float[Tensor, "b h m m"]:
        logits = dot_product(self._heads(self.q, x), self._heads(self.k, x), self.scale)
        return safe_softmax(logits if seen is None else logits.masked_fill(~seen[:, None, None], masks.NEG_INF))

    def _heads(self, linear: nn.Linear, x: Tensor) -> Float[Tensor, "b h m d"]:
        return self._activated(linear(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _activated(self, x: Tensor) -> Tensor:
        return x if self.norm is None else F.relu(x)

    @staticmethod
    def _without_hidden(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the fields, with zeros for those that nobody sees, and which are seen."""
        if mask is None:
            return x, None
        seen = masks.keys_of(mask, x.shape[0], x.shape[1])
        return x.masked_fill(~seen[..., None], 0.0), seen

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, max(1, dim // heads), variant="release")
