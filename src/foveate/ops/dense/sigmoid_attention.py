"""Sigmoid attention: every key gets its weight independently.

Theory, Analysis, and Best Practices for Sigmoid Self-Attention (2024), arXiv 2409.04431.
"""

from __future__ import annotations

import math
from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.core.scoring import Tile, dot_product
from foveate.ops.base.scored import Scored
from foveate.ops.functional.alibi import alibi_slopes


@final
class SigmoidAttention(Scored):
    """`sigmoid(q kᵀ · scale + bias) v`: weights in (0, 1) that do not compete and need not sum to 1.

    Cost O(Nq Nk D) time and O(N) memory, without the fused softmax kernel's speed. A drop-in for training from scratch;
    the wrong choice for weights that were trained with a softmax. It trains well if the output is small at the start:
    use a bias near `-log n`, or ALiBi. LayerScale or a norm on the output help; they belong to the layer.

    Args:
        bias: added to the logits. "-log n" for n keys in the call, so that fresh weights sum to about 1; "row" for
            `-log` of the keys that each query may see by causality (the paper's option, not in its release); or a
            number. To decode, give the number that the model was trained with, since "-log n" would follow the length
            so far; it therefore does not stream.
        alibi: True lets logits fall with distance, by ALiBi's slopes; the bias may then be 0.
        variant: "release" uses the signed distance, as the released simulator does, which raises keys after the query.
            The two agree under causality.
    """

    def __init__(
        self,
        bias: Literal["-log n", "row"] | float = "-log n",
        *,
        alibi: bool = False,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:
        super().__init__()
        if bias not in ("-log n", "row") and (isinstance(bias, bool | str) or not math.isfinite(bias)):
            raise OptionError(f'bias={shown(bias)} must be "-log n", "row" or a finite number')
        validate.one_of("variant", variant, ("paper", "release"))
        self.bias, self.alibi, self.variant = bias, alibi, variant
        if bias == "-log n":
            self._declare(streaming=None)

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        logits = dot_product(q, k, scale)
        if not self.alibi:
            return logits
        distance = at.cols - at.rows[:, None]
        if self.variant == "paper":
            distance = -distance.abs()
        return logits + alibi_slopes(q.shape[1]).to(logits)[:, None, None] * distance

    def normalize(self, logits: Tensor, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        if self.bias == "row" and at.causal:
            return torch.sigmoid(logits - (at.rows[:, None] + 1).to(logits.dtype).log())
        return torch.sigmoid(logits - math.log(at.n_keys) if isinstance(self.bias, str) else logits + self.bias)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls("row", alibi=True)
