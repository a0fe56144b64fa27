"""Optimised, slim and super attention: multi-head attention with fewer projections.

You Need to Pay Better Attention (2024), arXiv 2403.01643.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.layer import StreamingLayer
from foveate.nn.parts.heads import HeadScheme, HeadState, split
from foveate.nn.parts.positions import Position
from foveate.ops.functional.causal import causal_product
from foveate.ops.operator import Operator


@final
class OptimisedAttention(HeadScheme):
    """Multi-head attention without W_v: a head's values are its slice of the token. 3 C² parameters in place of 4 C².

    W_o follows W_v with only an average in between, and can learn the product of the two. The price is that the values
    of a head come from its own C / H channels. Cost: one projection less.

    Args:
        dim: C.
        heads: H, a divisor of C.
        op: an operator or its key.
        position: a position scheme, or None.
        bias: True gives all projections biases.
    """

    def __init__(
        self, dim: int, heads: int, *, op: str | Operator = "softmax", position: Position | None = None,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, op=op, position=position, bias=bias)
        self.q = nn.Linear(dim, dim, bias)
        self.k = nn.Linear(dim, dim, bias)

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return split(self.q(x), self.heads), split(self.k(source), self.heads), split(source, self.heads)


@final
class SlimAttention(HeadScheme):
    """Multi-head attention without W_v and W_k: a head's keys and values are its slice of the token. 2 C² parameters.

    The paper calls it "Efficient Attention"; it is not the linear one of that name. Keys and values are the tokens, so
    a cache holds only one tensor. Args are those of `OptimisedAttention`.
    """

    def __init__(
        self, dim: int, heads: int, *, op: str | Operator = "softmax", position: Position | None = None,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, op=op, position=position, bias=bias)
        self.q = nn.Linear(dim, dim, bias)

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        own = split(source, self.heads)
        return split(self.q(x), self.heads), own, own


@dataclass(frozen=True)
class SuperState:
    """The state of a stream: that of attention, and the tokens so far, `(B, n, C)`, which later values mix."""

    heads: HeadState
    past: Tensor


@final
class SuperAttention(StreamingLayer):
    """Slim attention whose values are first mixed across positions by a learned matrix: `V = W_A x`, W_A `(L, L)`.

    All heads and inputs share W_A: it mixes by position, and attention then by content. It has 2 C² + L² parameters and
    costs O(N²) with any operator. The wrong choice if important tokens change position, or lengths vary much: L is
    fixed, shorter inputs use the top left of W_A, and longer ones raise.

    Args:
        dim: C.
        heads: H, a divisor of C.
        context_len: L, the most tokens (of the source, in cross attention).
        causal: True refuses calls without `causal=True`, for layers that have learned only the lower half of W_A.
        op: an operator or its key.
        position: a position scheme for queries and keys, or None.
        bias: True gives all projections biases.

    Raises:
        OptionError: an option out of range. ShapeError: more tokens than `context_len`.

    A causal call uses the lower triangle of W_A. Masks hide keys from all queries or from none ("keys"): a value mixes
    several tokens, so a mask by pairs could not hide one from one query. W_A starts at the identity, where this is slim
    attention; that is our choice, and the paper leaves it to the framework. The paper's count of parameters implies
    that keys are slices of the token, and a port agrees.
    """

    def __init__(
        self, dim: int, heads: int, context_len: int, causal: bool = False, *, op: str | Operator = "softmax",
        position: Position | None = None, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("context_len", context_len, 1)
        if not isinstance(causal, bool):
            raise OptionError(f"causal={shown(causal)} must be True or False")
        self.slim = SlimAttention(dim, heads, op=op, position=position, bias=bias)
        self.context_len = context_len
        self.alignment = nn.Parameter(torch.eye(context_len))
        can = self.slim.capabilities
        patterns = can.patterns & {"causal self"} if causal else can.patterns
        self._declare(inputs=can.inputs, streaming=can.streaming, patterns=patterns, masks=can.masks & {"keys"})

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        source = x if source is None else source
        q, k, _ = self.slim.project(x, source, mask)
        values = source if mask is None else masks.without_hidden(source[:, None], mask)[:, 0]
        v = split(self._aligned(values, causal), self.heads)
        return self.slim.attend(q, k, v, x, mask, causal, **self.slim.rates(x, source), **inputs)

    def _aligned(self, source: Float[Tensor, "b m c"], causal: bool) -> Float[Tensor, "b m c"]:
        length = source.shape[1]
        self._check_length(length)
        mixing = self.alignment[:length, :length]
        return causal_product(mixing.tril(), source) if causal else mixing @ source

    def _check_length(self, length: int) -> None:
        if length > self.context_len:
            raise ShapeError(f"x must have at most context_len={self.context_len} tokens; got {length}")

    # -- a stream ------------------------------------------------------------------------------------------------------

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> SuperState:
        tokens = torch.zeros(batch, 0, self.dim, dtype=dtype, device=device)
        return SuperState(self.slim.init_state(batch, dtype=dtype, device=device), tokens)

    def _step(self, x: Tensor, state: SuperState, **inputs: Tensor) -> tuple[Tensor, SuperState]:
        tokens = torch.cat([state.past, x], 1)
        self._check_length(tokens.shape[1])
        value = self.alignment[tokens.shape[1] - 1, : tokens.shape[1]] @ tokens
        q, k, _ = self.slim.project(x, x, None)
        out, heads = self.slim.attend_next(q, k, split(value[:, None], self.heads), x, state.heads, **inputs)
        return out, SuperState(heads, tokens)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, SuperState]:
        q, k, _ = self.slim.project(x, x, None)
        out, heads = self.slim.attend_first(q, k, split(self._aligned(x, True), self.heads), x, **inputs)
        return out, SuperState(heads, x)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        layer = cls(dim, heads, length + 3, bias=True)
        nn.init.normal_(layer.alignment, std=length**-0.5)
        return layer
