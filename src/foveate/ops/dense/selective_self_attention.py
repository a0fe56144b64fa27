"""Selective self-attention: a temperature for each query and each value.

Selective Attention: Enhancing Transformer through Principled Context Control (2024), arXiv 2411.12892.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.ops.base.scored import Scored
from foveate.ops.operator import CAUSAL_PATTERNS


@final
class SelectiveSelfAttention(Scored):
    """`softmax(tau_q(t) q_t kᵀ · scale) (tau_v(s) v_s)`: a token sets the temperature of its query and of its value.

    It costs as much as softmax attention, on the same fused kernels, plus one number and two vectors per head. It needs
    training or fine-tuning; at the start it is nearly a pretrained model's softmax. Causal only: the position part
    counts the keys that a query may see, `n = position + 1`, padding included.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        beta: start of the position part `1 + exp(-exp(beta)) log n`, which counters dilution as n grows. 1.5 suits
            training, 2.0 fine-tuning; 20 leaves exactly 1.
        query_tau: parts of a query's temperature: "pos+tok" is their sum, "tok" is `1 + tok`.
        value_tau: "tok" multiplies a value by `1 + tok`.
        kv_heads: heads of value vectors, each shared by neighbouring heads of a call; None for `heads`.
        value_dim: Dv; None for `head_dim`.
        variant: the learned number of the position part: "paper": alpha in `1 + sigmoid(alpha) log n`, "release": beta.
            Both start at the same temperature.

    The token part is `tanh(w . gelu(x) + b)` of the projected query or value. The release does not have it: the shared
    hidden layer, the GELU and the start at w = b = 0, where tok = 0, are reconstructed from the paper's text.

    The paper's system is a layer. It acts only on q and v, so it is an operator here, for any layer to use.
    """

    capabilities = replace(Scored.capabilities, patterns=CAUSAL_PATTERNS)

    def __init__(
        self,
        heads: int,
        head_dim: int,
        beta: float = 1.5,
        *,
        query_tau: Literal["pos+tok", "pos", "tok"] | None = "pos+tok",
        value_tau: Literal["tok"] | None = "tok",
        kv_heads: int | None = None,
        value_dim: int | None = None,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:
        super().__init__()
        kv_heads, value_dim = heads if kv_heads is None else kv_heads, head_dim if value_dim is None else value_dim
        sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads, "value_dim": value_dim}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        validate.between("beta", beta, -20, 20)
        validate.one_of("query_tau", query_tau, ("pos+tok", "pos", "tok", None))
        validate.one_of("value_tau", value_tau, ("tok", None))
        validate.one_of("variant", variant, ("paper", "release"))
        if heads % kv_heads:
            raise OptionError(f"kv_heads={kv_heads} must divide heads={heads}")
        self.variant = variant
        parts = (query_tau or "").split("+")
        self.position = nn.Parameter(torch.tensor(self._start(beta))) if "pos" in parts else None
        self.query_token = TokenTemperature(heads, head_dim) if "tok" in parts else None
        self.value_token = TokenTemperature(kv_heads, value_dim) if value_tau else None

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        tau = 1.0 if self.position is None else self.position_temperature(positions + 1)[:, None].to(q.dtype)
        if self.query_token is not None:
            tau = tau + self.query_token(q)
        return q * tau, k

    def values(self, v: Tensor) -> Tensor:
        return v if self.value_token is None else v * (1 + self.value_token(v))

    def position_temperature(self, n: Tensor) -> Tensor:
        """Return the position part for queries that see `n` keys: 1 for n = 1, and growing with n."""
        assert self.position is not None
        factor = torch.exp(-torch.exp(self.position)) if self.variant == "release" else torch.sigmoid(self.position)
        return 1 + factor * torch.log(n.to(self.position.dtype))

    def _start(self, beta: float) -> float:
        if self.variant == "release":
            return beta
        log_factor = -math.exp(beta)  # sigmoid(alpha) = exp(log_factor)
        return max(log_factor - math.log(-math.expm1(log_factor)), -100.0)  # finite, and its sigmoid is 0 in any sum

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        op, random = cls(heads, head_dim, beta=0.0, kv_heads=1), torch.Generator().manual_seed(0)
        for token in (op.query_token, op.value_token):
            assert token is not None  # the default has both
            nn.init.normal_(token.weight, generator=random)
        return op

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim, beta=20.0, kv_heads=1)


@final
class TokenTemperature(nn.Module):
    """`tanh(w . gelu(x) + b)` for each token of `x (B, H, N, D)`: `(B, H, N, 1)` in (-1, 1), and 0 at the start."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(heads, width)), nn.Parameter(torch.zeros(heads))

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n 1"]:
        heads, width = self.weight.shape
        if x.shape[1] % heads or x.shape[3] != width:
            raise ShapeError(f"built for {heads} heads of width {width}; got H={x.shape[1]}, D={x.shape[3]}")
        weight, bias = (p.to(x.dtype).repeat_interleave(x.shape[1] // heads, 0) for p in (self.weight, self.bias))
        return torch.tanh(F.gelu(x) @ weight[:, :, None] + bias[:, None, None])
