"""Lightning attention: linear attention with a fixed decay per head, tiled forward and backward.

Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models (2024),
arXiv 2401.04658.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, final

from torch import Tensor

from foveate.core import validate
from foveate.ops.base import fixed_decay
from foveate.ops.base.fixed_decay import FixedDecay, Variant, transnormer_decay
from foveate.ops.functional import linear_forms

__all__ = ["LightningAttention2", "transnormer_decay"]


@final
class LightningAttention2(FixedDecay):
    """`out_i = sum_{j <= i} decay^(i - j) (q_i . k_j) v_j`: no softmax, no feature map, no normalizer. Causal only.

    Cost O(N block D + N D²) time, and a state of D x Dv numbers per head for any length. A head with a strong decay
    forgets tokens within a few hundred steps. Nothing bounds the output's norm: a layer normalizes it. The wrong choice
    for exact recall of one token among many.

    Args:
        decay: the factor per step of each head, `(H,)` in (0, 1], or "transnormer" for `transnormer_decay`.
        layer, depth: the layer's number and the number of layers, for "transnormer": later layers look further back.
        variant: the slopes of "transnormer"; see `transnormer_decay`.
        block: tokens in a block. It changes the speed, not the result.
        backward: "tiled" saves only q, k, v for the backward pass and recomputes the states; "autograd" saves the
            blocks' matrices, and can be differentiated twice.

    The decay is a constant: it gets no gradient. `scale` is 1 unless a call gives another.

    Raises:
        OptionError: a decay outside (0, 1], or an option of the wrong kind.
        ShapeError: a call with another number of heads than `decay` has.
    """

    def __init__(
        self, decay: Tensor | Sequence[float] | Literal["transnormer"] = "transnormer", *, layer: int = 0,
        depth: int = 1, variant: Variant = "paper", block: int = 64, backward: Literal["tiled", "autograd"] = "tiled",
    ) -> None:  # fmt: skip
        super().__init__(decay, layer=layer, depth=depth, variant=variant, block=block)
        validate.one_of("backward", backward, ("tiled", "autograd"))
        self.backward = backward

    def scan(self, fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
        if self.backward == "autograd":
            return linear_forms.chunked(fq, fk, v, log_decay, state, self.block)
        return fixed_decay.scan(fq, fk, v, log_decay, state, self.block)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=max(1, length // 4))
