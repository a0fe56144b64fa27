"""MoH: heads as experts; a router picks and weighs a few of them for each token.

MoH: Multi-Head Attention as Mixture-of-Head Attention (2024), arXiv 2410.11842.
"""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.parts.heads import HeadScheme, QKNorm, head_norm, split
from foveate.nn.parts.positions import Position
from foveate.ops.operator import Operator


@final
class MixtureOfHeadAttention(HeadScheme):
    """`sum_h g_h(x) head_h W_o^h`: attention whose heads a router weighs for each token, many of them with 0.

    Some heads are shared (always on); each token gets its best `routed_active` of the others. Cost: that of multi-head
    attention and a router of `C x (H + 2)`. All heads need keys and values, since another token may pick them, so an
    inactive head saves only query work, and only with a kernel that skips it. The wrong choice if heads are few, or
    without `balance_loss` in training: the router then keeps the heads it began with.

    Args:
        dim: C.
        heads: H.
        shared_heads: number of first heads that are on for every token.
        routed_active: K, the number of other heads for each token. It may be 0 if all heads are shared.
        router: "linear" learns gates; "query_norm" has no parameters, to continue from a pretrained model: it takes the
            K heads with the longest queries and weighs each with 1 (in training with the gradient of its share).
        rescale: True scales gates to mean 1, as in the release for images; False keeps the paper's shares.
        kv_heads: Hkv, a divisor of H; None for H.
        head_dim: D; None for `dim / heads`. The release's larger diffusion models have 8, 16 or 24 heads by layer, all
            of one width.
        qk_norm: the norm of each head's queries and keys: False, True or "rms" (RMSNorm), or "layer" (LayerNorm), which
            is the release's. The router "query_norm" compares queries before the norm.
        op: an operator or its key.
        position: a position scheme, or None. The router reads queries before their rotation.
        bias: True gives all projections biases; the router has none.

    Raises:
        OptionError: an option out of range, or a split of the heads without an active head.

    The release crashes with one shared head; its weight is 1 here, by the formula. Without shared heads, or without
    routed ones, there is no balance between the two groups to learn.
    """

    def __init__(
        self, dim: int, heads: int = 8, shared_heads: int = 4, routed_active: int = 2, *,
        router: Literal["linear", "query_norm"] = "linear", rescale: bool = True, kv_heads: int | None = None,
        head_dim: int | None = None, qk_norm: QKNorm = False, op: str | Operator = "softmax",
        position: Position | None = None, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, kv_heads=kv_heads, head_dim=head_dim, op=op, position=position, bias=bias)
        validate.count("shared_heads", shared_heads, 0)
        validate.count("routed_active", routed_active, 0)
        validate.one_of("router", router, ("linear", "query_norm"))
        routed = heads - shared_heads
        if not (0 < routed_active <= routed or routed_active == routed == 0):
            raise OptionError(
                f"routed_active={routed_active} must be in 1..{routed}, heads={heads} minus shared_heads="
                f"{shared_heads}; 0 if all are shared"
            )
        if router == "query_norm" and routed < 2:
            raise OptionError(
                f"router='query_norm' must have at least 2 routed heads; got heads - shared_heads = {routed}"
            )
        self.shared_heads, self.routed_active, self.rescale = shared_heads, routed_active, rescale
        self.q = nn.Linear(dim, heads * self.head_dim, bias)
        self.k = nn.Linear(dim, self.kv_heads * self.head_dim, bias)
        self.v = nn.Linear(dim, self.kv_heads * self.head_dim, bias)
        self.q_norm = head_norm("qk_norm", qk_norm, self.head_dim)
        self.k_norm = head_norm("qk_norm", qk_norm, self.head_dim)
        linear = router == "linear"
        self.routed = nn.Linear(dim, routed, bias=False) if linear and routed else None
        self.shared = nn.Linear(dim, shared_heads, bias=False) if linear and shared_heads > 1 else None
        self.groups = nn.Linear(dim, 2, bias=False) if linear and routed and shared_heads else None

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._queries(x), split(self.k(source), self.kv_heads), split(self.v(source), self.kv_heads)
        return (q, k, v) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k), v)

    def weigh(self, out: Tensor, x: Tensor, q: Tensor) -> Tensor:
        asks = q if self.q_norm is None or self.routed is not None else self._queries(x)
        return out * self._gates(x, asks).transpose(1, 2)[..., None]

    def _queries(self, x: Tensor) -> Float[Tensor, "b h n d"]:
        return split(self.q(x), self.heads)

    def gates(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n h"]:
        """Return each head's weight for each token."""
        return self._gates(x, self._queries(x))

    def _gates(self, x: Tensor, q: Tensor) -> Tensor:
        if self.routed is None and self.shared_heads < self.heads:
            return self._hard(q)
        routed, shared, groups = (None if w is None else w(x) for w in (self.routed, self.shared, self.groups))
        if self.shared_heads == 1:  # the share of a single shared head in its group is 1
            shared = x.new_zeros(*x.shape[:-1], 1)
        return moh_gates(routed, shared, groups, self.routed_active, self.rescale)

    def _hard(self, q: Tensor) -> Tensor:
        """Return 1 for shared and chosen heads; in training, chosen heads pass the gradient to their shares."""
        share = self._shares(q)
        chosen = top(share, self.routed_active)
        if self.training:
            chosen = chosen + (share - share.detach()) * chosen
        return torch.cat([chosen.new_ones(*chosen.shape[:-1], self.shared_heads), chosen], -1)

    def _shares(self, q: Tensor) -> Tensor:
        """Return the scores of routed heads under "query_norm", `(B, N, H - shared)`, from queries `(B, H, N, D)`."""
        length = q[:, self.shared_heads :].norm(dim=-1).transpose(1, 2)
        spread = length.std(-1, keepdim=True).clamp(min=torch.finfo(length.dtype).eps)
        return torch.softmax(length / spread, -1)

    def balance_loss(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, ""]:
        """Return the loss to add to training, times 0.01: see `balance_loss` of this module. 0 if all are shared.

        It is a pure function of the layer's input, so the caller has to leave out padding.
        """
        if not self.routed_active:
            return x.new_zeros(())
        share = self._shares(self._queries(x)) if self.routed is None else self.routed(x).softmax(-1)
        return balance_loss(share, self.routed_active)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, shared_heads=heads // 2, routed_active=1, kv_heads=heads // 2, bias=True)


def moh_gates(
    routed: Float[Tensor, "*n r"] | None, shared: Float[Tensor, "*n s"] | None, groups: Float[Tensor, "*n 2"] | None,
    routed_active: int, rescale: bool = True,
) -> Float[Tensor, "*n h"]:  # fmt: skip
    """Return the weights of all heads, the shared ones first, from the router's logits.

    Each group of heads has its own softmax, of which the routed one keeps its largest `routed_active`; `groups`
    balances the two. With `rescale` each of the three has mean 1 over its kept entries.
    """
    parts = []
    if shared is not None:
        parts.append(shared.softmax(-1) * (shared.shape[-1] if rescale else 1))
    if routed is not None:
        share = routed.softmax(-1)
        kept = share * top(share, routed_active)
        if rescale:
            kept = kept / kept.sum(-1, keepdim=True) * routed_active
        parts.append(kept)
    if groups is not None:
        balance = groups.softmax(-1) * (2 if rescale else 1)
        parts = [part * balance[..., i : i + 1] for i, part in enumerate(parts)]
    return torch.cat(parts, -1)


def top(share: Float[Tensor, "*n r"], k: int) -> Float[Tensor, "*n r"]:
    """Return 1 for the k largest, 0 for the others."""
    return torch.zeros_like(share).scatter(-1, share.topk(k, -1).indices, 1.0)


def balance_loss(share: Float[Tensor, "*n r"], routed_active: int) -> Float[Tensor, ""]:
    """Return `r² mean_i(f_i P_i)`: f_i is the fraction of tokens that get head i, P_i its mean share.

    It is `routed_active` if all heads are used equally, and more if tokens concentrate on some heads.
    """
    heads = share.shape[-1]
    chosen = top(share, routed_active)
    return heads**2 * (chosen.reshape(-1, heads).mean(0) * share.reshape(-1, heads).mean(0)).mean()
