"""Dynamic mask attention: keys whose values say that they are important are seen by all later queries.

Trainable Dynamic Mask Sparse Attention (2025), arXiv 2508.02124.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.nn.parts import positions
from foveate.nn.parts.heads import HeadScheme, QKNorm, head_norm, merge, split, width
from foveate.nn.parts.positions import Position
from foveate.ops.sparse.dynamic_mask import ImportantKeys, with_importance


@final
class DynamicMaskAttention(HeadScheme):
    """`concat_h(softmax(q kᵀ / sqrt(D) + δ) v) W_o`, in which each query sees the `keep` past keys of largest δ.

        δ_j = exp(a softplus(W v_j))       v_j of all key/value heads together; one a and one δ for each of them

    δ does not depend on the query. A key outside the choice gets no work, and no gradient from queries that do not see
    it; W and a learn through the weights of keys that are seen. Cost O(N keep C). At first a is 0: all keys are equally
    important, the later ones are kept, and the layer is a sliding window of `keep` tokens. With `keep >= N` it is
    grouped-query attention with a bias. A stream holds `keep` tokens. The wrong choice if it depends on the query which
    keys matter, or for short inputs.

    The paper's small gap to full attention did not show in our short training on associative recall: 0.47 of the pairs
    after 400 steps, against 1.0 for full attention and 0.13 for a window.

    Args:
        dim, heads: C and Hq.
        kv_heads: Hkv, a divisor of Hq; None for Hq.
        keep: keys that each query sees. A call of no more tokens is full attention.
        bias_form: "exp" as above (the paper, transformers' Doge), or "linear", `δ = a softplus(W v)`, as in the later
            code of its authors.
        head_dim: D; None for `C / Hq`.
        position: a position scheme without a bias, or None; the paper has `Rotary()`.
        qk_norm: the norm of each head's queries and keys; True is the paper's RMSNorm.
        bias: True gives all projections biases.
    """

    def __init__(
        self, dim: int, heads: int = 8, kv_heads: int | None = None, keep: int = 2048,
        bias_form: Literal["exp", "linear"] = "exp", *, head_dim: int | None = None, position: Position | None = None,
        qk_norm: QKNorm = True, bias: bool = False,
    ) -> None:  # fmt: skip
        d = width(dim, heads, head_dim)
        positions.check(position, heads)
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=d + 1, value_dim=d, op=ImportantKeys(keep), bias=bias,
            position=position if position is None or position.biased else _Inner(position),
        )  # fmt: skip
        validate.one_of("bias_form", bias_form, ("exp", "linear"))
        self.bias_form = bias_form
        self.q = nn.Linear(dim, heads * d, bias)
        self.k = nn.Linear(dim, self.kv_heads * d, bias)
        self.v = nn.Linear(dim, self.kv_heads * d, bias)
        self.q_norm, self.k_norm = (head_norm("qk_norm", qk_norm, d) for _ in range(2))
        self.w = nn.Linear(self.kv_heads * d, self.kv_heads, bias)
        self.a = nn.Parameter(torch.zeros(self.kv_heads))

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, (k, v) = split(self.q(x), self.heads), (split(part(source), self.kv_heads) for part in (self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # the operator divides by the root of D + 1
        q = q * ((q.shape[-1] + 1) / q.shape[-1]) ** 0.5
        return *with_importance(q, k, self.importance(v), self.head_dim**-0.5), v

    def importance(self, v: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
        """Return δ for the values of all key/value heads."""
        rate = self.a * F.softplus(self.w(merge(v)))
        return (rate.exp() if self.bias_form == "exp" else rate).transpose(1, 2)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        made = cls(dim, heads, max(1, heads // 2), max(1, round(0.4 * length)), bias=True)
        nn.init.constant_(made.a, 2.0)
        return made


@final
class _Inner(Position):
    """Positions on all channels but the last one, the importance."""

    def __init__(self, inner: Position) -> None:
        super().__init__()
        self.inner = inner

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        return torch.cat([self.inner.rotate(x[..., :-1], at), x[..., -1:]], -1)
