"""Co-attention: two sequences attend to each other over one matrix of affinities."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import ShapeError
from foveate.core.scoring import safe_softmax


@final
class CoAttention(nn.Module):
    """`C = a W bᵀ`: the softmax of its rows reads b for each token of a; that of its columns reads a for each of b.

    It suits pairs such as question and image, or premise and hypothesis; O(N M) time and memory. The wrong choice if
    only one side has queries: cross attention is half of it. With `pool` each side is read once: a token's logit is its
    largest (or mean) affinity, and each side becomes one vector.

    Args:
        dim: width of a's tokens.
        other_dim: width of b's tokens; None for `dim`.
        pool: "max" or "mean" for one vector a side, None for one vector a token.
        activation: the activation of the affinities: "tanh" (as for images and questions), or None.

    The form is the survey's (1904.02874); the activation is an option because the survey's examples differ.
    """

    def __init__(
        self, dim: int, other_dim: int | None = None, *, pool: Literal["max", "mean"] | None = None,
        activation: Literal["tanh"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        other_dim = dim if other_dim is None else other_dim
        validate.count("dim", dim, 1)
        validate.count("other_dim", other_dim, 1)
        validate.one_of("pool", pool, ("max", "mean", None))
        validate.one_of("activation", activation, ("tanh", None))
        self.pool, self.activation = pool, activation
        self.weight = nn.Parameter(torch.empty(dim, other_dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(
        self, a: Float[Tensor, "b n c"], b: Float[Tensor, "b m e"], *,
        mask: Bool[Tensor, "b n"] | None = None, other_mask: Bool[Tensor, "b m"] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the outputs of a, read from b, and those of b, read from a.

        Args:
            a, b: `(B, N, C)` and `(B, M, E)`.
            mask, other_mask: True for real tokens of a (of b).

        Returns:
            `(B, N, E)` from b and `(B, M, C)` from a, zeros for padding; with `pool`, a's summary `(B, C)` and b's
            `(B, E)`.
        """
        a, mask = _real(a, mask, "mask", self.weight.shape[0])
        b, other_mask = _real(b, other_mask, "other_mask", self.weight.shape[1])
        affinity = a @ self.weight @ b.mT
        affinity = torch.tanh(affinity) if self.activation else affinity
        both = mask[:, :, None] & other_mask[:, None, :]
        if self.pool is None:
            affinity = affinity.masked_fill(~both, masks.NEG_INF)
            return safe_softmax(affinity) @ b, safe_softmax(affinity.mT) @ a
        first, second = (self._summary(*side) for side in ((affinity, both, a), (affinity.mT, both.mT, b)))
        return first, second

    def _summary(self, affinity: Tensor, both: Tensor, tokens: Tensor) -> Float[Tensor, "b c"]:
        if self.pool == "max":
            logits = affinity.masked_fill(~both, masks.NEG_INF).amax(-1)
        else:
            met = both.sum(-1)
            logits = (affinity.masked_fill(~both, 0.0).sum(-1) / met).masked_fill(met == 0, masks.NEG_INF)
        return (safe_softmax(logits)[:, None] @ tokens).squeeze(1)


def _real(x: Tensor, mask: Tensor | None, name: str, width: int) -> tuple[Tensor, Tensor]:
    """Return tokens with zeros for padding, and the mask of real tokens."""
    if x.dim() != 3 or x.shape[-1] != width:
        raise ShapeError(f"tokens must be (B, N, {width}); got {tuple(x.shape)}")
    if mask is None:
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    validate.bool_mask(name, mask, "B, N", tuple(x.shape[:2]), x.device)
    mask = mask.expand(x.shape[:2])
    return x.masked_fill(~mask[..., None], 0.0), mask
