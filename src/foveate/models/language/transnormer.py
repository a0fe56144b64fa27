"""TransNormerLLM: a decoder with lightning attention, without softmax and without parameters in its norms.

Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024), arXiv 2405.17381.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.models.base.network import TextNetwork
from foveate.nn import Block, Layer, StreamingLayer
from foveate.nn.parts.blocks import GatedMLP, stacked
from foveate.ops.base.fixed_decay import Variant
from foveate.ops.functional.heads import accumulating
from foveate.ops.linear.lightning_attention import LightningAttention


class SimpleRMSNorm(nn.Module):
    """`x / (|x|₂ / sqrt(C))`: a root mean square norm without parameters. `eps` is added under the root."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        return F.rms_norm(x, (self.dim,), eps=self.eps)


class LRPE(nn.Module):
    """`[x cos(i theta), x sin(i theta)]` at position i, so that each channel's product has `cos((i - j) theta)`.

    The frequencies are learned. They start at `10000^(-2 c / C)` for channel c of all C, so that heads start different.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.theta = nn.Parameter(10_000 ** (-2 / width * torch.arange(width)).view(heads, 1, head_dim))

    def forward(self, x: Float[Tensor, "b h n d"], first: int = 0) -> Float[Tensor, "b h n two_d"]:
        """Encode positions; `first` is the position of the first of these tokens."""
        theta = self.theta.to(accumulating(self.theta.dtype))  # bfloat16 has no exact integers beyond 256
        angle = torch.arange(first, first + x.shape[2], device=x.device, dtype=theta.dtype)[:, None] * theta
        return torch.cat([x * angle.cos(), x * angle.sin()], -1).to(x.dtype)


class GLAState(NamedTuple):
    """The operator's state, and the number of tokens so far."""

    op: Any
    seen: int


@final
class GatedLightning(StreamingLayer):
    """GLA: `SRMSNorm(lightning(silu(x W_q), silu(x W_k), x W_v)) * (x W_u)`, times `W_o`; causal, O(N).

    Args:
        dim, heads: C, and H, which divides it.
        op: the operator, with this layer's decays.
        lrpe: whether queries and keys are encoded by `LRPE`, which makes them twice as wide.
    """

    capabilities = replace(
        Layer.capabilities,
        patterns=frozenset({"causal self"}),
        masks=frozenset({"keys"}),
        streaming="exact",
        growth="N",
    )

    def __init__(self, dim: int, heads: int, op: LightningAttention | None = None, *, lrpe: bool = False) -> None:
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.op = LightningAttention() if op is None else op
        self.inward, self.out = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm = SimpleRMSNorm(dim)
        self.lrpe = LRPE(heads, dim // heads) if lrpe else None

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        q, k, v, u = self._projected(x, 0)
        return self._merged(self.op(q, k, v, mask=mask, causal=True), u)

    def _projected(self, x: Tensor, first: int) -> tuple[Tensor, ...]:
        q, k, v, u = self.inward(x).chunk(4, -1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (F.silu(q), F.silu(k), v))
        return (q, k, v, u) if self.lrpe is None else (self.lrpe(q, first), self.lrpe(k, first), v, u)

    def _merged(self, out: Tensor, u: Tensor) -> Tensor:
        return self.out(self.norm(rearrange(out, "b h n d -> b n (h d)")) * u)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> GLAState:
        width = self.dim // self.heads
        sizes = batch, self.heads, self.heads, width if self.lrpe is None else 2 * width, width
        return GLAState(self.op.init_state(*sizes, dtype=dtype, device=device), 0)

    def _step(self, x: Tensor, state: GLAState, **inputs: Tensor) -> tuple[Tensor, GLAState]:
        q, k, v, u = self._projected(x, state.seen)
        out, after = self.op.step(q, k, v, state.op)
        return self._merged(out, u), GLAState(after, state.seen + 1)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, LightningAttention(layer=1, depth=3, block=max(1, length // 3)), lrpe=True)


@final
class TransNormerLLM(TextNetwork):
    """A decoder from tokens `(B, N)` to logits `(B, N, vocabulary)`. Trains in O(N), decodes with a constant state.

    Blocks are `x + GLA(SRMSNorm(x))`, then `x + SGLU(SRMSNorm(x))` with `SGLU(x) = (x W_1 * x W_2) W_3`. The first
    layer has `LRPE` and a decay as positions, the others only their decays, which reach further back from layer to
    layer. The wrong choice if a token has to be retrieved among many: no layer compares keys exactly.

    Args:
        vocabulary: number of tokens.
        dim, depth, heads: width, number of blocks, and heads of each.
        hidden: width inside the channel mixer; None is the default of `GatedMLP`.
        decay: "transnormer", a decay for each layer (see `transnormer_decay`), or factors per step `(heads,)` for all.
        variant: the slopes of "transnormer": "paper" or "release".
        block: number of tokens in a block of the attention.

    As in the release, the frequencies of LRPE are learned, the gate has no activation, and there are no biases. The
    release's later versions (SiLU on the values, a norm with parameters, a low-rank sigmoid gate) are left out.

    Raises:
        OptionError: an option out of range.
    """

    def __init__(
        self, vocabulary: int, dim: int, depth: int, heads: int, *, hidden: int | None = None,
        decay: Sequence[float] | Literal["transnormer"] = "transnormer", variant: Variant = "paper", block: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("vocabulary", vocabulary, 1)
        validate.count("dim", dim, 1)
        validate.count("depth", depth, 1)
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            op = LightningAttention(decay, layer=layer, depth=depth, variant=variant, block=block)
            mixer = GatedLightning(dim, heads, op, lrpe=layer == 0)
            self.blocks.append(Block(mixer, GatedMLP(dim, hidden, act=nn.Identity()), norm=SimpleRMSNorm))
        self.norm, self.head = SimpleRMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))

    def init_state(self, batch: int) -> list[Any]:
        """Return each layer's state before the first token."""
        like = self.embed.weight
        return [block.init_state(batch, dtype=like.dtype, device=like.device) for block in stacked(self.blocks)]

    def step(self, token: Int[Tensor, "b 1"], state: list[Any]) -> tuple[Float[Tensor, "b 1 v"], list[Any]]:
        """Return the logits after one more token, and the next state."""
        x, after = self.embed(token), []
        for block, before in zip(stacked(self.blocks), state, strict=True):
            x, now = block.step(x, before)
            after.append(now)
        return self.head(self.norm(x)), after

    @classmethod
    def example(cls) -> Self:
        return cls(11, 8, 3, 2, block=4)
