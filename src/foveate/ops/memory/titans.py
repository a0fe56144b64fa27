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
from foveate.ops.functional import inner_mlp as learner
from foveate.ops.functional.fast_weights import Layer, Outer, Weights


@final
class Titans(Memory):
    """The long-term memory (LMM): `M(k)` learns `v` by gradient steps on `|M(k) - v|²` and answers `M(q)`.

    Cost O(N P) for P fast weights per head, and a state of 3 P numbers whatever the length. With depth 1 and
    `alpha = eta = 0`, `chunk=1` it is the delta rule with step `2 theta`: a key written again replaces its value, where
    a sum of outer products would add up. It compresses: the wrong choice where a few tokens must be recalled exactly
    out of very many. This is the memory alone, as an operator: its compositions with attention (memory as context, gate
    or layer: MAC, MAG, MAL), persistent tokens, convolution and projections are the layers of `foveate.nn`.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        value_dim: Dv; `head_dim` where None.
        depth: layers of the MLP, without biases. The paper prefers 2 and more.
        expansion: hidden width over `head_dim`.
        activation: between the layers, "silu" or "gelu". The paper names none; the common port has "gelu".
        alpha, eta, theta: forgetting, momentum and step, for calls that bring no tensors of these names. In the paper
            all three come from the token, through a sigmoid.
        chunk: tokens whose gradients are taken at the same weights (16 to 64 in training); 1 is the exact rule.
        unit: scale queries and keys to length 1, as the paper does.
        reads: "token": a token reads the weights that it has just written. "chunk": it reads those at the start of its
            chunk. That is cheaper, but tokens of a chunk do not see what the chunk itself writes; with chunk=1 a token
            reads before it writes. What is written, and so the state that is handed on, is the same.
        max_grad_norm: the largest norm of a token's gradient in one layer; larger ones are scaled down to it. None, as
            in the paper: then loud inputs or long steps can make the weights grow without bound, and a call that they
            make infinite raises `DivergedError`.
        generator: for the first weights. The last layer starts at zero, so that an empty memory answers 0.

    The first weights are parameters, trained by the outer loop. The authors have released no code, and the paper leaves
    open the first weights and the activation of the MLP: both are reconstructed here.

    Where the common port (titans-pytorch) differs:
        the MLP: it reads `x + norm(mlp(x))`, with a norm whose gain is a fast weight too, GELU, 4 times as wide, and
            Xavier's first weights in all layers (here: `mlp(x)`, and zeros in the last layer).
        the loss: averaged over channels (here summed, so that theta is `1 / Dv` of the port's).
        rates: one forgetting and one momentum for a chunk (here all act token by token).
        reading: as with "chunk", but for the last token of a chunk, which reads what that has written.
        queries and keys: neither SiLU, convolution nor unit length, but a norm of the tokens before the projections.
        steps: it can bound each gradient's norm, smoothly, and has that off by default; see `max_grad_norm`.

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
        validate.one_of("activation", activation, tuple(learner.ACTIVATIONS))
        self.activation = learner.ACTIVATIONS[activation]
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "depth": depth, "expansion": expansion}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        widths = [head_dim, *[head_dim * expansion] * (depth - 1), value_dim]
        shapes = [(heads, tall, wide) for wide, tall in pairwise(widths)]
        hidden = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes[:-1]]
        self.first = nn.ParameterList([*hidden, torch.zeros(shapes[-1])])

    def initial(self, heads: int, key_dim: int, value_dim: int, like: Tensor) -> Weights:
        return learner.first("Titans", self.first, (heads, key_dim, value_dim), like)

    def read(self, layers: Sequence[Layer], q: Tensor) -> Tensor:
        return learner.read(layers, q, self.activation)

    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rates: Mapping[str, Tensor]) -> tuple[Outer, ...]:
        return learner.gradients(weights, k, lambda read: 2 * (read - v), self.activation)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, chunk=max(1, min(4, length // 2)), generator=torch.Generator().manual_seed(0))
