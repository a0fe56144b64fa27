"""Lightning attention: linear attention with a fixed decay per head, tiled forward and backward.

Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models (2024),
arXiv 2401.04658.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, final

from torch import Tensor

from foveate.core import validate
from foveate.ops.base import fixed_decay as tiled
from foveate.ops.base.fixed_decay import FixedDecay, Variant, transnormer_decay
from foveate.ops.functional import linear_forms as forms

__all__ = ["LightningAttention2", "transnormer_decay"]


@final
class LightningAttention2(FixedDecay):
    """`out_i = sum_{j <= i} decay^(i - j) (q_i . k_j) v_j`: no softmax, no feature map, no normaliser. Causal only.

    Cost O(N block D + N D²) time, and a state of D x Dv numbers per head whatever the length. What a head with a strong
    decay has seen a few hundred tokens ago is gone, and nothing bounds the output's norm: a layer normalises it. The
    wrong choice for exact recall of one token among many.

    Args:
        decay: the factor per step of each head, `(H,)` in (0, 1], or "transnormer" for `transnormer_decay`.
        layer, depth: which layer of how many, for "transnormer": later layers look further back.
        variant: which slopes "transnormer" means; see `transnormer_decay`.
        block: tokens in a block; it changes the speed, not the result.
        backward: "tiled" keeps q, k, v for the backward pass and rebuilds the states, so that nothing kept grows with
            the number of blocks; "autograd" keeps the blocks' matrices, and can be differentiated twice.

    The decay is a constant: it gets no gradient. `scale` is 1 unless a call says otherwise.

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
            return forms.chunked(fq, fk, v, log_decay, state, self.block)
        return tiled.scan(fq, fk, v, log_decay, state, self.block)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(block=max(1, length // 4))
