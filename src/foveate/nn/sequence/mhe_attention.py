"""Multi-head embedding attention: one projection for all heads, and a small vector for each head.

Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention (2023),
arXiv 2310.07911.
"""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.nn.parts.heads import HeadScheme, HeadState, width
from foveate.nn.parts.positions import Position
from foveate.ops.base.kv_cached import Cached
from foveate.ops.base.kv_state import KVState
from foveate.ops.operator import Operator


@final
class MultiHeadEmbeddingAttention(HeadScheme):
    """Attention whose heads share W_q, W_k, W_v of one head's size: `Q_h = x W_q + e_h`, or `x W_q * (1 + e_h)`.

    It saves `3 C D (H - 1) - 3 H D` parameters of multi-head attention. Its cache is as small as that of multi-query
    attention, 2 D numbers a token for any H, since the embeddings are applied on reading. Time is that of H heads. The
    wrong choice if heads have to attend to different features: with "mul" a head rescales the shared ones, with "add"
    it only prefers some keys for every query.

    Args:
        dim: C.
        heads: H.
        mode: "mul" or "add". Under "add" with a softmax, key embeddings have no effect: they shift a row of scores.
        head_dim: D; None for `dim / heads`.
        spread: standard deviation of the initial embeddings. Heads that start alike may stay alike: on a task that
            needs attention to several positions, 8 heads learned with a spread of 1 and not with 0.02; 4 heads did not.
        op: an operator or its key.
        position: a position scheme, applied after the embeddings, or None.
        bias: True gives all projections biases.

    Raises:
        OptionError: an option out of range.

    The authors' repository holds no code; this follows the paper. The normal distribution of initial embeddings is the
    paper's, the default spread is reconstructed. Operators that read the whole past keep the cache of one head; others
    keep a state for each head.
    """

    q_heads: nn.Parameter
    k_heads: nn.Parameter
    v_heads: nn.Parameter

    def __init__(
        self, dim: int, heads: int, mode: Literal["mul", "add"] = "mul", head_dim: int | None = None, *,
        spread: float = 0.02, op: str | Operator = "softmax", position: Position | None = None, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, head_dim=head_dim, op=op, position=position, bias=bias)
        validate.one_of("mode", mode, ("mul", "add"))
        validate.at_least("spread", spread, 0)
        self.mode = mode
        self.q = nn.Linear(dim, self.head_dim, bias)
        self.k = nn.Linear(dim, self.head_dim, bias)
        self.v = nn.Linear(dim, self.head_dim, bias)
        for name in ("q_heads", "k_heads", "v_heads"):
            self.register_parameter(name, nn.Parameter(spread * torch.randn(heads, self.head_dim)))

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self._with_embeddings(self.q(x), self.k(source), self.v(source))

    def _with_embeddings(
        self, q: Float[Tensor, "b n d"], k: Float[Tensor, "b m d"], v: Float[Tensor, "b m d"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add or multiply each head's embeddings onto the shared tensors: `(B, H, ·, D)`."""
        shared, own = (q, k, v), (self.q_heads, self.k_heads, self.v_heads)
        q, k, v = (
            x[:, None] + e[:, None] if self.mode == "add" else x[:, None] * (1 + e[:, None])
            for x, e in zip(shared, own, strict=True)
        )
        return q, k, v

    # -- a stream ------------------------------------------------------------------------------------------------------

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        if not isinstance(self.op, Cached):
            return super()._init_state(batch, dtype, device)
        return HeadState(KVState.empty(batch, 1, self.head_dim, self.head_dim, dtype, device), 0)

    def _step(self, x: Tensor, state: HeadState, **inputs: Tensor) -> tuple[Tensor, HeadState]:
        if not isinstance(self.op, Cached):
            return super()._step(x, state, **inputs)
        past = state.op.append(self.k(x)[:, None], self.v(x)[:, None])
        heads = self._with_embeddings(self.q(x), past.k[:, 0], past.v[:, 0])
        return self.attend(*heads, x, None, True, **inputs), HeadState(past, state.seen + 1)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, HeadState]:
        if not isinstance(self.op, Cached):
            return super()._prefill(x, **inputs)
        past = KVState(self.k(x)[:, None], self.v(x)[:, None])
        heads = self._with_embeddings(self.q(x), past.k[:, 0], past.v[:, 0])
        return self.attend(*heads, x, None, True, **inputs), HeadState(past, x.shape[1])

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, head_dim=3, spread=1.0, bias=True)


def mhe_param_count(dim: int, heads: int, head_dim: int | None = None) -> int:
    """Return the number of parameters of such a layer without biases: `3 C D + 3 H D + H D C`."""
    size = width(dim, heads, head_dim)
    return 3 * dim * size + 3 * heads * size + heads * size * dim
