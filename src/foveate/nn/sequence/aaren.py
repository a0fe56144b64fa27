"""The layer of Aaren: what causal self-attention is to a transformer, with one learned question in place of queries.

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
    """`y_t = W_o softmax(q . W_k x_{<= t}) W_v x_{<= t}` with `q = W_q token` learned: a set of what has come so far.

    Streams with a constant state at the numbers of the parallel call. By itself it does not know the order inside a
    prefix, and no token looks anything up; stacked, each layer asks its question of prefixes of prefixes. The wrong
    choice where a token must find another one: use `MultiHeadAttention`.

    Args:
        dim: C.
        heads: H, a divisor of `dim`.
        bias: whether all projections have biases.

    Each layer has a token of its own. The paper hands the query on from layer to layer of its own stack; how, beside a
    learned token for the first one, is not settled here by a release, as there is none.

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

    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
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
        """The question and the tokens' keys and values, `(B, H, N, D)` each."""
        asked = self.q(self.token).expand_as(x)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (asked, self.k(x), self.v(x)))
        return q, k, v

    def _merged(self, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        return self.out(rearrange(out, "b h n d -> b n (h d)"))
