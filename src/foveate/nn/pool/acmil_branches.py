"""The attention of ACMIL: several branches look at a bag, and training hides some of the instances that they prefer.

Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification (2023), arXiv 2311.07125; the
network and its loss are in `acmil`.
"""

from __future__ import annotations

from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.core.scoring import safe_softmax
from foveate.nn.base.pool import Pool, Pooled


def stochastic_topk_mask(
    scores: Float[Tensor, "*b n"], k: int = 10, ratio: float = 0.6, *, training: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*b n"]:  # fmt: skip
    """Hide some of the k highest logits of each row, drawn at random; a softmax then gives their weight to the others.

    Of a row's `t = min(k, n)` highest logits, `floor(ratio * t)` become the lowest number of the dtype, whose weight is
    0. If that hides a whole row, its weights are equal, as in the release.

    Args:
        scores: logits; those of -inf are padding, which is not counted.
        k: the logits that may be hidden; 0 hides none.
        ratio: the share of them that is hidden.
        training: False returns the logits as they are.
        generator: draws the hidden ones.

    Raises:
        OptionError: k or ratio out of range, or something to hide without a generator.
    """
    validate.count("k", k)
    validate.between("ratio", ratio, 0, 1)
    if not training or int(ratio * k) == 0:
        return scores
    k = min(k, scores.shape[-1])
    top = scores.topk(k, -1)
    real = top.values > masks.NEG_INF
    rank = drawn(real.shape, generator, scores.device).masked_fill(~real, 2.0).argsort(-1).argsort(-1)
    hidden = torch.tensor([int(ratio * t) for t in range(k + 1)], device=scores.device)[real.sum(-1, keepdim=True)]
    where = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top.indices, rank < hidden)
    return scores.masked_fill(where, torch.finfo(scores.dtype).min)


class Branches(Pool):
    """The common part of both attentions: maps in which training hides some of the highest logits.

    Args:
        dim: C, the width of instances and of a branch's vector.
        branches: M, the branches, each with a vector.
        maps: the number of weight maps.
        k, mask_ratio, generator: see `stochastic_topk_mask`. Training needs the generator unless `k` or `mask_ratio` is
            0; evaluation does not.
    """

    def __init__(
        self, dim: int, branches: int, maps: int, k: int, mask_ratio: float, generator: torch.Generator | None
    ) -> None:
        validate.count("branches", branches, 1)
        validate.count("k", k)
        validate.between("mask_ratio", mask_ratio, 0, 1)
        super().__init__(dim, slots=branches, maps=maps)
        self.k, self.mask_ratio, self.generator = k, mask_ratio, generator

    def _challenged(self, logits: Float[Tensor, "b m n"], mask: Tensor | None) -> Float[Tensor, "b m n"]:
        """Return the weights of logits over the real instances that training has not hidden."""
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], masks.NEG_INF)
        hidden = stochastic_topk_mask(logits, self.k, self.mask_ratio, training=self.training, generator=self.generator)
        return safe_softmax(hidden)


@final
class GatedBranches(Branches):
    """M branches on one gated trunk: `A = softmax_N(W_a (tanh(V h) * sigmoid(U h)))`, and `f_m = A_m h`.

    With one branch and `k=0` it is the gated attention of Attention-based Deep Multiple Instance Learning (2018), arXiv
    1802.04712. O(N C hidden).

    Args:
        dim: C, the width of instances h and of a branch's vector.
        branches: M, the branches, each with one map and one vector.
        hidden: width of the trunk.
        k, mask_ratio: training hides `floor(mask_ratio * k)` of the k instances with the highest logits of each map;
            see `stochastic_topk_mask`.
        generator: draws them; training needs it unless `k` or `mask_ratio` is 0.
    """

    def __init__(
        self, dim: int, branches: int = 5, *, hidden: int = 128, k: int = 10, mask_ratio: float = 0.6,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        validate.count("hidden", hidden, 1)
        super().__init__(dim, branches, branches, k, mask_ratio, generator)
        self.content, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, branches)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        logits = self.score(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x))).mT
        weights = self._challenged(logits, mask)
        return Pooled(weights @ x, weights)

    @classmethod
    def example(cls, dim: int) -> Self:
        made = cls(dim, 3, hidden=8, k=4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.score.weight.mul_(10)  # first logits are so small that all maps are nearly flat
        return made


@final
class HeadBranches(Branches):
    """M branches of multi-head attention, each from its own learned vector u_m with its own maps (ACMIL's MHA form).

    `f_m = LN(dropout(W_o concat_h softmax_N(q_h k_hᵀ (C / H)^-0.5) v_h))` with `q = W_q u_m`, `k = W_k h` and
    `v = W_v h`. Training hides instances from each head by itself. Head h of branch m is map `m * heads + h`. It costs
    O(M N C²).

    Args:
        dim: C, a multiple of `heads`.
        branches, k, mask_ratio, generator: see `GatedBranches`; the generator draws dropout too.
        heads: H.
        dropout: the share of a branch's channels that training drops before the norm.
    """

    def __init__(
        self, dim: int, branches: int = 5, *, heads: int = 8, k: int = 10, mask_ratio: float = 0.6,
        dropout: float = 0.1, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        validate.count("dim", dim, 1)
        validate.count("branches", branches, 1)
        validate.count("heads", heads, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        super().__init__(dim, branches, branches * heads, k, mask_ratio, generator)
        self.heads = heads
        self.queries = nn.Parameter(nn.init.normal_(torch.zeros(branches, dim), std=1e-6))
        self.to_q = nn.ModuleList(nn.Linear(dim, dim) for _ in range(branches))
        self.to_k = nn.ModuleList(nn.Linear(dim, dim) for _ in range(branches))
        self.read_outs = nn.ModuleList(WeightedHeads(dim, heads, dropout, generator) for _ in range(branches))

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        logits = torch.stack([self._logits(m, x) for m in range(self.slots)], 1)
        weights = self._challenged(logits.flatten(1, 2), mask)
        each = weights.unflatten(1, (self.slots, self.heads)).unbind(1)
        vectors = [read_out(x, own) for read_out, own in zip(self.read_outs, each, strict=True)]
        return Pooled(torch.stack(vectors, 1), weights)

    def _logits(self, branch: int, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n"]:
        q = self.to_q[branch](self.queries[branch]).unflatten(-1, (self.heads, -1))
        k = self.to_k[branch](x).unflatten(-1, (self.heads, -1))
        return torch.einsum("hd,bnhd->bhn", q * q.shape[-1] ** -0.5, k)

    @classmethod
    def example(cls, dim: int) -> Self:
        random = torch.Generator().manual_seed(0)
        return cls(dim, 3, heads=2 if dim % 2 == 0 else 1, k=4, generator=random)


@final
class WeightedHeads(nn.Module):
    """The value side of multi-head attention: one vector from given weights of each head.

    `LN(dropout(W_o concat_h A_h (W_v x)_h))`; for the arguments see `HeadBranches`.
    """

    def __init__(self, dim: int, heads: int, dropout: float, generator: torch.Generator | None) -> None:
        super().__init__()
        validate.between("dropout", dropout, 0, 1)
        self.heads, self.dropout, self.generator = heads, dropout, generator
        self.v, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "b n c"], weights: Float[Tensor, "b h n"]) -> Float[Tensor, "b c"]:
        v = self.v(x).unflatten(-1, (self.heads, -1))
        out = self.out(torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1))
        if self.training and self.dropout:
            kept = drawn(out.shape, self.generator, out.device) >= self.dropout
            out = out * kept / max(1 - self.dropout, torch.finfo(out.dtype).tiny)
        return self.norm(out)


def drawn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Float[Tensor, "..."]:
    """Draw uniform numbers in 0..1, or refuse a call that has no generator to draw them."""
    if generator is None:
        raise OptionError("generator=None must be a torch.Generator: training hides instances and drops at random")
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
