"""L2ViT's linear attention: ReLU features and a clamped normalizer.

The Linear Attention Resurrection in Vision Transformer (2025), arXiv 2501.16182.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.ops.base.linear import Linear


@final
class ReLULinear(Linear):
    """Weights `t_h relu(q_i) . relu(k_j) / max(sum_j relu(q_i) . relu(k_j), clamp)`, at O(N D²).

    Weights are never negative and spread widely: the wrong choice by itself if a few keys matter. The large clamp is
    part of the method: it keeps gradients small and helps accuracy. The weights of a row whose sum is below the clamp
    add up to less than t, so few or small tokens give a small output; a clamp near 0 gives row-normalized attention.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        clamp: the least divisor of a row.
        temperature: start of the learned factor `t_h`; None for `head_dim ** -0.5`. It multiplies only the numerator.

    A call's `scale` multiplies the products before the clamp; it is 1 by default, since the temperature replaces it.
    The paper's form is bidirectional; the causal form clamps the sum over the keys so far.
    """

    capabilities = replace(Linear.capabilities, default_scale=1.0)

    def __init__(self, heads: int, head_dim: int, clamp: float = 100.0, *, temperature: float | None = None) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("head_dim", head_dim, 1)
        validate.between("clamp", clamp, 1e-6, 1e6)
        if temperature is not None:
            validate.between("temperature", temperature, -1e6, 1e6)
        self.clamp = clamp
        start = head_dim**-0.5 if temperature is None else float(temperature)
        self.temperature = nn.Parameter(torch.full((heads,), start))

    def query_features(self, q: Tensor, scale: float) -> Float[Tensor, "b h n d"]:
        if q.shape[1] != len(self.temperature):
            raise ShapeError(f"q must have the operator's heads={len(self.temperature)}; got Hq={q.shape[1]}")
        return F.relu(q) * scale

    def key_features(self, k: Tensor, scale: float) -> Float[Tensor, "b h n d"]:
        return F.relu(k)

    def normalize(self, out: Tensor) -> Tensor:
        total = out[..., -1:].clamp_min(self.clamp)
        return self.temperature.to(out.dtype)[:, None, None] * out[..., :-1] / total

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, clamp=0.1 * head_dim * length)
