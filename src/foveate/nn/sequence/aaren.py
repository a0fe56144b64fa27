"""The layer of Aaren: causal self-attention with one learned query in place of a query per token.

Attention as an RNN (2024), arXiv 2405.13956.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.ops.linear.aaren import Aaren, AarenState


@final
class AarenLayer(StreamingLayer):
    """`y_t = W_o softmax(q . W_k x_{<= t}) W_v x_{<= t}` with `q = W_q token` learned: each output pools a prefix.

    It streams with a constant state, and its outputs equal those of the parallel call. One layer ignores the order
    inside a prefix, and tokens have no queries of their own; stacked layers pool prefixes of prefixes. The wrong choice
    if a token must find another one: use `MultiHeadAttention`.

    Args:
        dim: C.
        heads: H, a divisor of `dim`.
        bias: True gives all projections biases.

    Each layer has its own token. The paper passes the query from layer to layer, from a learned token for the first
    one. There is no release that settles how.

    Raises:
        OptionError: `heads` does not divide `dim`.
    """

    capabilities = replace(
        Layer.capabilities,
        patterns=frozenset({"causal self"}),
        masks=frozenset({"keys"}),
        streaming="exact",
        growth="N",
    )

    def __init__(self, dim: int, heads: int = 1, *, bias: bool = False) -> None:
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.op = Aaren()
        self.token = nn.Parameter(torch.randn(dim))
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return self._merged(self.op(*self._heads(x), mask=mask, causal=True))

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> AarenState:
        width = self.dim // self.heads
        return self.op.init_state(batch, self.heads, self.heads, width, width, dtype=dtype, device=device)

    def _step(self, x: Tensor, state: AarenState, **inputs: Tensor) -> tuple[Tensor, AarenState]:
        out, state = self.op.step(*self._heads(x), state)
        return self._merged(out), state

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, AarenState]:
        out, state = self.op.prefill(*self._heads(x))
        return self._merged(out), state

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query and the tokens' keys and values, `(B, H, N, D)` each."""
        query = self.q(self.token).expand_as(x)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (query, self.k(x), self.v(x)))
        return q, k, v

    def _merged(self, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.out(rearrange(out, "b h n d -> b n (h d)"))
