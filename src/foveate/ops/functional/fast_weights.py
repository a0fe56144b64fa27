"""Fast weights: matrices that change from token to token, applied without materialising each one.

Along a chunk, momentum and decay are linear in their first values and in the tokens' gradients, which have rank one. So
a row of shares gives the weights at each token, and a product with them is attention inside the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core.readable import is_clean
from foveate.ops.functional.causal import causal_product, poison
from foveate.ops.functional.recurrence import decay_matrix, linear_recurrence, since_the_start, without_traces

#: The matrices `(B, H, out, in)` of a learner, one for each layer.
Weights = tuple[Tensor, ...]

#: One layer as a function: `(B, H, C, in) -> (B, H, C, out)`, where each token may have its own matrix.
Layer = Callable[[Tensor], Tensor]


class Outer(NamedTuple):
    """The gradient `left rightᵀ` of one matrix for each token: `left (B, H, C, out)`, `right (B, H, C, in)`."""

    left: Tensor
    right: Tensor


class Shares(NamedTuple):
    """The coefficients of memory and momentum after each token, `(..., C, 2 + C)`.

    Their order: shares of the first memory, of the first momentum, and of each token's negated gradient.
    """

    memory: Tensor
    momentum: Tensor


def shares(rates: Mapping[str, Tensor]) -> Shares:
    """Return the shares: `S_t = eta S_{t-1} - theta u_t`, `M_t = (1 - alpha) M_{t-1} + write S_t`; rates `(..., C)`."""
    start = torch.eye(2 + rates["theta"].shape[-1], dtype=rates["theta"].dtype, device=rates["theta"].device)
    momentum = linear_recurrence(rates["eta"], F.pad(torch.diag_embed(rates["theta"]), (2, 0)), start[1])
    memory = linear_recurrence(1 - rates["alpha"], rates["write"][..., None] * momentum, start[0])
    return Shares(without_traces(memory), without_traces(momentum))


def shares_at_the_end(rates: Mapping[str, Tensor]) -> Shares:
    """Return the last row of `shares`, `(..., 1, 2 + C)`, in O(C²); all rows take O(C³)."""
    theta, kept = rates["theta"][..., None, :], 1 - rates["alpha"]
    fade, first = decay_matrix(rates["eta"]), since_the_start(rates["eta"])
    left = F.pad(kept[..., 1:], (0, 1), value=1.0).flip(-1)
    left = since_the_start(left).flip(-1)  # the shares of writes that are left at the end
    written = (rates["write"] * left)[..., None, :]
    last = first[..., -1:, None]
    momentum = torch.cat([torch.zeros_like(last), last, fade[..., -1:, :] * theta], -1)
    memory = torch.cat([kept.prod(-1)[..., None, None], written @ first[..., None], (written @ fade) * theta], -1)
    return Shares(without_traces(memory), without_traces(momentum))


@dataclass(frozen=True)
class Path:
    """One matrix along a chunk of C tokens.

    Args:
        memory, momentum: `(B, H, out, in)` at the start of the chunk.
        gradient: the tokens' gradients, all taken at the start of the chunk.
        shares: `(B, H, C, 2 + C)` each, or only the last rows if only the end of the path is needed.
    """

    memory: Float[Tensor, "b h o i"]
    momentum: Float[Tensor, "b h o i"]
    gradient: Outer
    shares: Shares

    def __call__(self, x: Float[Tensor, "b h c i"]) -> Float[Tensor, "b h c o"]:
        """Multiply token t's `x` by the memory after token t."""
        share, (left, right) = self.shares.memory, self.gradient
        old = share[..., :1] * (x @ self.memory.mT) + share[..., 1:2] * (x @ self.momentum.mT)
        return old - causal_product((share[..., 2:] * (x @ right.mT)).tril(), left)

    def written_out(self) -> Float[Tensor, "b h c o i"]:
        """Return the memory after each token, one matrix each: C times the bytes of one."""
        share, (left, right) = self.shares.memory[..., None], self.gradient
        new = self._sums(self.shares.memory[..., 2:], left, right)
        first, push = share[..., :1, :], share[..., 1:2, :]
        return first * self.memory[:, :, None] + push * self.momentum[:, :, None] - new

    @staticmethod
    def _sums(share: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Sum the tokens' gradients so far, each with its share; NaN in later ones has no effect."""
        if is_clean(left, right):
            return torch.einsum("bhts,bhso,bhsi->bhtoi", share, left, right)
        bad = [~torch.isfinite(x) for x in (left, right)]
        left, right = (x.masked_fill(where, 0.0) for x, where in zip((left, right), bad, strict=True))
        poisoned = poison(bad[0])[..., :, None] + poison(bad[1])[..., None, :]
        return torch.einsum("bhts,bhso,bhsi->bhtoi", share, left, right) + poisoned.to(left.dtype)

    def end(self) -> tuple[Tensor, Tensor]:
        """Return memory and momentum after the last token."""
        return self._at(self.shares.memory[..., -1, :]), self._at(self.shares.momentum[..., -1, :])

    def _at(self, share: Tensor) -> Tensor:
        share, (left, right) = share[..., None], self.gradient
        new = (share[..., 2:, :] * left).mT @ right
        return share[..., :1, :] * self.memory + share[..., 1:2, :] * self.momentum - new


def still(weights: Tensor) -> Layer:
    """Return a layer with weights `(B, H, out, in)`, or `(B, H, C, out, in)` with one matrix for each token."""
    if weights.dim() == 4:
        return lambda x: x @ weights.mT
    return lambda x: (weights @ x[..., None]).squeeze(-1)
