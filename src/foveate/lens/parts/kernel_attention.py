"""Attention with other weights than softmax's, and with biases that take the part of a sink.

When Attention Sink Emerges in Language Models: An Empirical View (2024), arXiv 2410.10781.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.host.fused_statistics import grouped

Kind = Literal["softmax", "sigmoid", "elu", "elu_kernel", "linear", "mlp"]
KINDS = ("softmax", "sigmoid", "elu", "elu_kernel", "linear", "mlp")


@final
class KernelAttention(nn.Module):
    """Causal attention whose weights are a similarity, divided by their sum or not.

    Similarities of a query and a key are `exp`, `sigmoid` or `elu + 1` of the scaled product, or products of features:
    `elu + 1` of each, the vectors themselves ("linear"), or those of a shared two-layer network ("mlp"). Signed sums
    ("linear", "mlp") are divided by their size, at least 1. All pairs are computed: O(N²).

    Args:
        heads: the number of query heads.
        width: the width of a head.
        kind: the similarity.
        normalize: divide weights by their sum; "softmax" needs it.
        kv_bias: "k" adds a learnt key without a position to each head, whose value is zero; "kv" gives it a learnt
            value; "v" learns a value for a key of zero.
    """

    def __init__(
        self, heads: int, width: int, kind: Kind = "softmax", normalize: bool = True,
        kv_bias: Literal["k", "v", "kv"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("width", width, 1)
        validate.one_of("kind", kind, KINDS)
        validate.one_of("kv_bias", kv_bias, (None, "k", "v", "kv"))
        validate.flag("normalize", normalize)
        if kind == "softmax" and not normalize:
            raise OptionError('normalize=False must go with another kind than "softmax"; try kind="sigmoid"')
        self.heads, self.width, self.kind, self.normalize, self.kv_bias = heads, width, kind, normalize, kv_bias
        if kind == "mlp":
            self.features = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        if kv_bias is not None and "k" in kv_bias:
            self.k_bias = nn.Parameter(0.02 * torch.randn(heads, width))
        if kv_bias is not None and "v" in kv_bias:
            self.v_bias = nn.Parameter(0.02 * torch.randn(heads, width))

    def forward(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hkv n d"], v: Float[Tensor, "b hkv n d"],
        causal: bool = True,
    ) -> Float[Tensor, "b h n d"]:  # fmt: skip
        """Return the heads' outputs."""
        values = grouped(v, self.heads)
        if self.kv_bias is not None:
            extra = self.v_bias if "v" in self.kv_bias else v.new_zeros(self.heads, v.shape[-1])
            values = _before(extra, values)
        return self.weights(q, k, causal) @ values

    def weights(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hkv n d"], causal: bool = True
    ) -> Float[Tensor, "b h n s"]:
        """Return the weights; with a bias, its column comes first."""
        if q.shape[1] != self.heads or q.shape[-1] != self.width:
            raise ShapeError(f"q must be (B, {self.heads}, N, {self.width}); got {tuple(q.shape)}")
        keys = grouped(k, self.heads)
        if self.kv_bias is not None:
            keys = _before(self.k_bias if "k" in self.kv_bias else k.new_zeros(self.heads, self.width), keys)
        seen = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device)
        if causal:
            seen = seen.tril(keys.shape[2] - q.shape[2])  # the last query sees every key, the first of all the bias
        if self.kind == "softmax":
            logits = q @ keys.mT * self.width**-0.5
            return logits.masked_fill(~seen, float("-inf")).softmax(-1)
        found = self._similarity(q, keys) * seen
        if not self.normalize:
            return found
        total = found.sum(-1, keepdim=True)
        return found / (total.abs().clamp_min(1.0) if self.kind in ("linear", "mlp") else total + 1e-8)

    def _similarity(self, q: Tensor, k: Tensor) -> Float[Tensor, "b h n s"]:
        scale = self.width**-0.5
        if self.kind == "sigmoid":
            return (q @ k.mT * scale).sigmoid()
        if self.kind == "elu":
            return F.elu(q @ k.mT * scale) + 1
        if self.kind == "elu_kernel":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        elif self.kind == "mlp":
            q, k = self.features(q), self.features(k)
        return q @ k.mT * scale


def _before(extra: Float[Tensor, "h d"], x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n1 d"]:
    return torch.cat([extra.to(x)[None, :, None].expand(len(x), -1, 1, -1), x], 2)
