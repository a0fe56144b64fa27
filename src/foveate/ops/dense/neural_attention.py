"""Neural attention: a small network scores each pair of a query and a key.

Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models (2025), arXiv 2502.17206.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import Tile
from foveate.ops.base.scored import Scored


@final
class NeuralAttention(Scored):
    """`softmax(mlp([q'_i ; k'_j])) v`: it learns relations that no bilinear form has, such as "close in one feature".

    Cost O(Nq Nk d'²) time, against O(Nq Nk D) for a dot product, without fused kernels, and d' numbers of memory for
    each pair of a tile. The paper's models use it only in the first layer and train it from scratch. A dot product is
    not among its limits: the wrong choice for pretrained weights, and for long sequences.

    Queries and keys are reduced to width d'; all heads share the network `2d' -> d' -> d'/2 -> 1` with ReLUs. Its first
    layer is linear in the pair, so one half is computed once per query, the other once per key, and the halves add up.
    The scale of a call multiplies scores and is 1 by default.

    Args:
        head_dim: D.
        proj_dim: d', at least 2; None for `head_dim // 32`, or 2 if that is less.
        layers: hidden layers. With 1 and "tanh" it is additive attention (Bahdanau); d' may then be 1.
        activation: the hidden layers' activation, "relu" or "tanh".

    Raises:
        OptionError: an option out of range.
        ShapeError: a call of another width.

    The release drops a caller's mask under causality; here both hold. In our own small runs on text (two layers, up to
    1,500 steps) dot products learned faster, so no test shows the paper's gain in perplexity.
    """

    capabilities = replace(Scored.capabilities, default_scale=1.0)

    def __init__(
        self, head_dim: int, proj_dim: int | None = None, *, layers: Literal[1, 2] = 2,
        activation: Literal["relu", "tanh"] = "relu",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("head_dim", head_dim, 1)
        validate.one_of("layers", layers, (1, 2))
        validate.one_of("activation", activation, ("relu", "tanh"))
        width = max(2, head_dim // 32) if proj_dim is None else proj_dim
        validate.count("proj_dim", width, 1)
        if layers == 2 and width < 2:
            raise OptionError(f"proj_dim={width} must be at least 2: the second hidden layer is half as wide")
        self.head_dim, self.activation = head_dim, activation
        self.reduce_q, self.reduce_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.pair = nn.Linear(2 * width, width)
        self.hidden = nn.Linear(width, width // 2) if layers == 2 else None
        self.last = nn.Linear(width // 2 if layers == 2 else width, 1)

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first layer's two halves, `(B, H, N, d')`."""
        if q.shape[-1] != self.head_dim:
            raise ShapeError(f"NeuralAttention was built for D={self.head_dim}; got q with D={q.shape[-1]}")
        of_query, of_key = self.pair.weight.chunk(2, dim=1)
        q, k = (
            _linear(q, self.reduce_q.weight, self.reduce_q.bias),
            _linear(k, self.reduce_k.weight, self.reduce_k.bias),
        )
        return _linear(q, of_query, self.pair.bias), _linear(k, of_key)

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        act = torch.relu if self.activation == "relu" else torch.tanh
        inside = act(q[:, :, :, None] + k[:, :, None])
        if self.hidden is not None:
            inside = act(_linear(inside, self.hidden.weight, self.hidden.bias))
        return _linear(inside, self.last.weight, self.last.bias).squeeze(-1) * scale

    def score_macs(self, width: int) -> int:
        inner = 0 if self.hidden is None else self.hidden.weight.numel()
        return inner + self.last.in_features

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(head_dim, 4)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
