"""LightNet's attention: linear attention whose keys are a softmax over the positions, running where it is causal.

You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (2024), arXiv 2405.21022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.ops.base.linear import Linear


@final
class LightNetAttention(Linear):
    """`phi(Q) (softmax_T(K)ᵀ V)`: every key channel shares out a weight of 1 over the positions; `phi` is SiLU.

    Cost O(N D Dv), and a state of D x (Dv + 1) numbers per head whatever the length. Nothing is tuned: instead of a
    decay by a factor, the past fades as the channel's sum grows, `S_t = (a_{t-1} / a_t) S_{t-1} + (exp k_t / a_t) v_tᵀ`
    with `a_t = a_{t-1} + exp k_t`. Without causality the order of the tokens does not matter, so that an image needs a
    single pass, and positions have to come from elsewhere: `foveate.nn.LightNet`. Weights may be negative and do not
    sum to 1; a layer normalises the output. The wrong choice for exact recall of one token, or where recent tokens must
    count for more whatever they hold: a running mean over n tokens moves by 1/n.

    The running sums are kept as logarithms, so that no key is too large; the causal engines fade each channel by its
    own factor (as gated linear attention does), in tiles small enough to write the factors out. It has no options.
    `scale` multiplies the weights and is 1 unless a call says otherwise; the port in flash-linear-attention has
    `D ** -0.5`, which the norm after it undoes.
    """

    capabilities = replace(Linear.capabilities, default_scale=1.0)
    normalised: ClassVar[bool] = False

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return F.silu(q) if scale == 1.0 else F.silu(q) * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k

    def encode_keys(
        self, k: Tensor, scale: float, causal: bool, hidden: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if hidden is not None:
            k = k.masked_fill(hidden, _nothing(k))
        if not causal:
            return k.softmax(-2), None
        total = k.logcumsumexp(-2)
        before = F.pad(total[:, :, :-1], (0, 0, 1, 0), value=_nothing(k))
        return torch.exp(k - total), before - total

    def carried(self, k: Tensor) -> Tensor:
        """The log of the running sums: a key of that size does to later ones what all of them did.

        In float64: near 12, after 100,000 tokens, a float32 takes one more in steps of a tenth of it, and the rounding
        adds up.
        """
        k = k if k.device.type == "mps" else k.double()  # which has none
        return F.pad(k, (0, 0, 1, 0), value=_nothing(k)).logsumexp(-2, keepdim=True)


def _nothing(k: Tensor) -> float:
    """A key that adds nothing to a sum of exponentials; finite, also in float32, so that differences are numbers."""
    return torch.finfo(torch.float32).min / 4
