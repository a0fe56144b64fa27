"""LightNet's attention: linear attention whose keys are a softmax over the positions, a running one if causal.

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
    """`phi(Q) (softmax_T(K)ᵀ V)`: every key channel distributes a weight of 1 over the positions; `phi` is SiLU.

    Cost O(N D Dv), and a state of D x (Dv + 1) numbers per head for any length. No decay rate has to be tuned: the past
    decays as the channel's sum grows, `S_t = (a_{t-1} / a_t) S_{t-1} + (exp k_t / a_t) v_tᵀ` with
    `a_t = a_{t-1} + exp k_t`. Without causality the order of the tokens has no effect, so an image needs a single pass
    and separate positions: `foveate.nn.LightNet`. Weights may be negative and do not sum to 1; a layer normalizes the
    output. The wrong choice for exact recall of one token, or if recent tokens must always count more: a running mean
    over n tokens moves by 1/n.

    The running sums are kept as logarithms, so that no key is too large. The causal engines decay each channel by its
    own factor, as in gated linear attention, in tiles small enough to compute the factors pair by pair. It has no
    options. `scale` multiplies the weights and is 1 unless a call gives another; the port in flash-linear-attention has
    `D ** -0.5`, which the norm after it cancels.
    """

    capabilities = replace(Linear.capabilities, default_scale=1.0)
    normalized: ClassVar[bool] = False

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
        # the first key that counts has nothing to fade: a decay of 0, as in the port, for a huge one would take the
        # digits of the others in sums
        return torch.exp(k - total), torch.where(before > _nothing(k) / 2, before - total, 0.0)

    def carried(self, k: Tensor) -> Tensor:
        """Return the log of the running sums: one key of that size affects later ones as all earlier keys together do.

        It is float64: near 12, after 100,000 tokens, one more token is only ten float32 steps, and the rounding adds
        up.
        """
        k = k if k.device.type == "mps" else k.double()  # which has none
        return F.pad(k, (0, 0, 1, 0), value=_nothing(k)).logsumexp(-2, keepdim=True)


def _nothing(k: Tensor) -> float:
    """Return a key that adds nothing to a sum of exponentials; finite, also in float32, so that differences are too."""
    return torch.finfo(torch.float32).min / 4
