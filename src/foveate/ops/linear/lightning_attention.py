"""Lightning attention, the operator of TransNormerLLM.

Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024), arXiv 2405.17381. The
language model of that paper is `foveate.models.language.transnormer`.
"""

from __future__ import annotations

from typing import Self, final

from torch import Tensor

from foveate.ops.base import fixed_decay
from foveate.ops.base.fixed_decay import FixedDecay


@final
class LightningAttention(FixedDecay):
    """`out_i = sum_{j <= i} decay^(i - j) (q_i . k_j) v_j`, block by block: constant time per token at every length.

    Inside a block, products of queries and keys come first, as in attention; between blocks, products of keys and
    values form a state. No sum runs over positions one by one. Cost O(N block D + N D²) time, and a state of D x Dv
    numbers per head. Causal only. Nothing bounds the output's norm: a layer normalizes it. The wrong choice for exact
    recall of one token among many, and for tokens that a head's decay has forgotten.

    The operator is that of Lightning Attention-2 (`foveate.ops.linear.lightning_attention_2`), whose backward pass it
    shares; that class can also use autograd's backward pass.

    Args:
        decay: the factor per step of each head, `(H,)` in (0, 1], or "transnormer" for TransNormerLLM's, see
            `foveate.ops.base.fixed_decay.transnormer_decay`.
        layer, depth: the layer's number and the number of layers, for "transnormer": later layers look further back.
        variant: the slopes of "transnormer": "paper" (head 0 never forgets) or "release" (ALiBi's).
        block: tokens in a block. It changes the speed, not the result.

    The decay is a constant: it gets no gradient. `scale` is 1 unless a call gives another. The engines are the paper's
    forms: "chunked" by blocks, "reference" in parallel, "recurrent" token by token.

    Raises:
        OptionError: a decay outside (0, 1], or an option of the wrong kind.
        ShapeError: a call with another number of heads than `decay` has.
    """

    def scan(self, fq: Tensor, fk: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
        return fixed_decay.scan(fq, fk, v, log_decay, state, self.block)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(layer=1, depth=3, variant="release", block=max(1, length // 3))
