"""Efficient attention: queries and keys are normalized separately, so that keys multiply values first.

Efficient Attention: Attention with Linear Complexities (2018), arXiv 1812.01243.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.ops.base.linear import Linear


@final
class EfficientAttention(Linear):
    """`rho_q(Q) (rho_k(K)ᵀ V)`: every query mixes D global summaries of the values. Not causal.

    Cost O(N D Dv) time and O(N (D + Dv) + D Dv) memory, against O(N²) for dot-product attention: it suits feature maps
    too large for that. Row d of `rho_k(K)ᵀ` is one attention map over all positions, and a query attends to a mixture
    of D maps: the wrong choice if each query has to find its own token. The paper has no causal form; `lightnet` has a
    softmax that runs along the positions.

    Args:
        normalizer: "softmax": rho_q is a softmax over the channels of each query, rho_k one over the positions of each
            channel. The weights `rho_q(Q) rho_k(K)ᵀ` are then not negative and each row sums to 1; they only
            approximate a softmax over the keys. "scaling": both divide by `sqrt(n)`, which is exactly dot-product
            attention `(Q Kᵀ / n) V`; n is the number of keys that are not masked.

    `scale` multiplies the queries before rho_q, and is 1 unless a call gives another.

    Raises:
        OptionError: an unknown normalizer.
    """

    capabilities = replace(
        Linear.capabilities, patterns=frozenset({"self", "cross"}), streaming=None, default_scale=1.0
    )
    normalized: ClassVar[bool] = False

    def __init__(self, normalizer: Literal["softmax", "scaling"] = "softmax") -> None:
        super().__init__()
        validate.one_of("normalizer", normalizer, ("softmax", "scaling"))
        self.normalizer = normalizer

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        q = q if scale == 1 else q * scale
        return q.softmax(-1) if self.normalizer == "softmax" else q

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k

    def encode_keys(
        self, k: Tensor, scale: float, causal: bool, hidden: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if self.normalizer == "softmax":
            return (k if hidden is None else k.masked_fill(hidden, torch.finfo(k.dtype).min)).softmax(-2), None
        # the keys carry both square roots, since queries and keys may differ in number
        n = k.shape[2] if hidden is None else (~hidden).sum(-2, keepdim=True).clamp_min(1)
        return k / n, None
