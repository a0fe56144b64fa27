"""Titans' neural long-term memory: an MLP trained on the past, with momentum and forgetting.

Titans: Learning to Memorize at Test Time (2025), arXiv 2501.00663.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, Self, final

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.ops.base.test_time import Memory, Reads
from foveate.ops.functional import inner_mlp
from foveate.ops.functional.fast_weights import Layer, Outer, Weights


@final
class Titans(Memory):
    """The long-term memory (LMM): `M(k)` learns `v` by gradient steps on `|M(k) - v|²`, and `M(q)` answers.

    Cost O(N P) for P fast weights per head, and a state of 3 P numbers for any length. With depth 1 and
    `alpha = eta = 0`, `chunk=1` it is the delta rule with step `2 theta`: a key written again replaces its value, while
    a sum of outer products would add up. It compresses: the wrong choice for exact recall of a few tokens out of very
    many. This operator is the memory alone. The layers of `foveate.nn` combine it with attention (memory as context,
    gate or layer: MAC, MAG, MAL), persistent tokens, convolution and projections.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        value_dim: Dv; None for `head_dim`.
        depth: layers of the MLP, without biases. The paper prefers 2 and more.
        expansion: hidden width over `head_dim`.
        activation: the function between the layers, "silu" or "gelu". The paper names none; the common port has "gelu".
        alpha, eta, theta: forgetting, momentum and step, for calls without tensors of these names. In the paper all
            three come from the token, through a sigmoid.
        chunk: tokens whose gradients are taken at the same weights (16 to 64 in training); 1 is the exact rule.
        unit: scale queries and keys to length 1, as the paper does.
        reads: "token": a token reads the weights that it has just written. "chunk": it reads those at the start of its
            chunk. That is cheaper, but tokens do not see the writes of their own chunk; with chunk=1 a token reads
            before it writes. The writes, and so the state after them, are the same.
        max_grad_norm: the largest norm of a token's gradient in one layer; larger ones are scaled down to it. With
            None, as in the paper, large inputs or steps can make the weights grow without bound, and a call with
            infinite answers raises `DivergedError`.
        generator: draws the first weights. The last layer starts at zero, so that an empty memory answers 0.

    The first weights are parameters, which the outer loop trains. The authors have released no code, and the paper does
    not specify the first weights and the activation of the MLP: both are reconstructed here.

    Where the common port (titans-pytorch) differs:
        the MLP: it reads `x + norm(mlp(x))`, with a norm whose gain is a fast weight too, GELU, 4 times as wide, and
            Xavier's first weights in all layers (here: `mlp(x)`, and zeros in the last layer).
        the loss: it averages over channels (here it sums, so that theta is `1 / Dv` of the port's).
        rates: it has one forgetting and one momentum for a chunk (here all act token by token).
        reading: it reads as with "chunk", except that the last token of a chunk reads the chunk's writes.
        queries and keys: it has no SiLU, convolution or unit length, but a norm of the tokens before the projections.
        steps: it can bound each gradient's norm, smoothly, which is off by default; see `max_grad_norm`.

    Raises:
        OptionError: an option out of range.
        ShapeError: a call with other heads or widths.
        DivergedError: the memory's weights have grown until an answer is NaN or inf.
    """

    def __init__(
        self, heads: int, head_dim: int, value_dim: int | None = None, *, depth: int = 2, expansion: int = 2,
        alpha: float = 0.01, eta: float = 0.5, theta: float = 0.1, chunk: int = 16, unit: bool = True,
        reads: Reads = "token", activation: Literal["silu", "gelu"] = "silu", max_grad_norm: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            alpha=alpha, eta=eta, theta=theta, chunk=chunk, unit=unit, reads=reads, max_grad_norm=max_grad_norm
        )
        validate.one_of("activation", activation, tuple(inner_mlp.ACTIVATIONS))
        self.activation = inner_mlp.ACTIVATIONS[activation]
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "depth": depth, "expansion": expansion}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        widths = [head_dim, *[head_dim * expansion] * (depth - 1), value_dim]
        shapes = [(heads, tall, wide) for wide, tall in pairwise(widths)]
        hidden = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes[:-1]]
        self.first = nn.ParameterList([*hidden, torch.zeros(shapes[-1])])

    def initial(self, heads: int, key_dim: int, value_dim: int, like: Tensor) -> Weights:
        return inner_mlp.first("Titans", self.first, (heads, key_dim, value_dim), like)

    def read(self, layers: Sequence[Layer], q: Tensor) -> Tensor:
        return inner_mlp.read(layers, q, self.activation)

    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rates: Mapping[str, Tensor]) -> tuple[Outer, ...]:
        return inner_mlp.gradients(weights, k, lambda read: 2 * (read - v), self.activation)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, chunk=max(1, min(4, length // 2)), generator=torch.Generator().manual_seed(0))
