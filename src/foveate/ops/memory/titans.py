"""Titans' neural long-term memory: an MLP trained on the past, with momentum and forgetting.

Titans: Learning to Memorize at Test Time (2025), arXiv 2501.00663.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self, final

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
        depth: layers of the MLP; SiLU between them, no biases. The paper prefers 2 and more.
        expansion: hidden width over `head_dim`.
        alpha, eta, theta: forgetting, momentum and step, for calls that bring no tensors of these names. In the paper
            all three come from the token, through a sigmoid.
        chunk: tokens whose gradients are taken at the same weights (16 to 64 in training); 1 is the exact rule.
        unit: scale queries and keys to length 1, as the paper does.
        reads: "token": a token reads the weights that it has just written. "chunk": it reads those at the start of its
            chunk. That is cheaper, but tokens of a chunk do not see what the chunk itself writes; with chunk=1 a token
            reads before it writes. What is written, and so the state that is handed on, is the same.
        generator: for the first weights. The last layer starts at zero, so that an empty memory answers 0.

    The first weights are parameters, trained by the outer loop. Against a common port: the loss is summed over channels
    and not averaged, rates act token by token, and token t reads the weights that it has just written. The port's
    longer chunks have one forgetting and momentum each, and are read as with "chunk", but for the last token of a
    chunk, which there reads what that has written.

    Raises:
        OptionError: an option out of range.
        ShapeError: a call with other heads or widths.
    """

    def __init__(
        self, heads: int, head_dim: int, value_dim: int | None = None, *, depth: int = 2, expansion: int = 2,
        alpha: float = 0.01, eta: float = 0.5, theta: float = 0.1, chunk: int = 16, unit: bool = True,
        reads: Reads = "token", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(alpha=alpha, eta=eta, theta=theta, chunk=chunk, unit=unit, reads=reads)
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
        return learner.read(layers, q)

    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rates: Mapping[str, Tensor]) -> tuple[Outer, ...]:
        return learner.gradients(weights, k, lambda read: 2 * (read - v))

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, chunk=max(1, min(4, length // 2)), generator=torch.Generator().manual_seed(0))
