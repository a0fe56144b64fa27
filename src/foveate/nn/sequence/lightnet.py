"""LightNet's blocks: attention in a single scan, and two position encodings for sequences and grids.

You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (2024), arXiv 2405.21022.
The operator is `foveate.ops.linear.lightnet`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.nn.parts.blocks import Block
from foveate.ops.base.streaming import Streaming
from foveate.ops.functional import linear_forms
from foveate.ops.functional.heads import accumulating
from foveate.ops.linear.lightnet import LightNetAttention
from foveate.ops.operator import Operator

Size = tuple[int, int]


def places(n: int, size: Size | None, device: torch.device) -> Tensor:
    """Return coordinates `(N, axes)` of tokens on a line, or on a grid row by row."""
    at = torch.arange(n, device=device)
    return at[:, None] if size is None else torch.stack([at // size[1], at % size[1]], -1)


class MDLRPE(nn.Module):
    """`[x cos a, x sin a]` with the angle `a = sum over axes of place * theta`: products have cosines of differences.

    As in the authors' kernels, each axis starts with its own channels and the usual frequencies, and theta is learned;
    the sum over axes is the paper's.
    """

    def __init__(self, axes: int, heads: int, width: int) -> None:
        super().__init__()
        validate.count("axes", axes, 1)
        share = -(-width // axes)
        channel = torch.arange(width)
        own = channel // share == torch.arange(axes)[:, None]
        theta = torch.where(own, 10_000 ** (-(channel % share) / share), 0.0)
        self.theta = nn.Parameter(theta[:, None].repeat(1, heads, 1))

    def forward(self, x: Float[Tensor, "b h n f"], at: Int[Tensor, "n a"]) -> Float[Tensor, "b h n two_f"]:
        theta = self.theta.to(accumulating(self.theta.dtype))  # bfloat16 cannot represent positions beyond 256
        angle = torch.einsum("na,ahf->hnf", at.to(theta.dtype), theta)
        return torch.cat([x * angle.cos(), x * angle.sin()], -1).to(x.dtype)


class MDTPE(nn.Module):
    """`x + sum over axes of T x`: it smooths each channel along each axis with weights by distance, in O(N).

    The weights of an axis, `t_j = sum_r c_r exp(-|j| rate_r)`, are a sum of `rank` learned decays per channel, so that
    recurrences compute them; if causal, `t_j = 0` for later tokens. The paper has such Toeplitz matrices and
    recurrences for them; this parametrisation is a reconstruction. At first the rates spread from a reach of one token
    to one of about 50, and all c are small.
    """

    def __init__(self, dim: int, axes: int, *, rank: int = 8, generator: torch.Generator | None = None) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("rank", rank, 1)
        rates = torch.linspace(0, -4, rank)
        self.log_rate = nn.Parameter(rates.repeat(axes, dim, 1))
        self.weight = nn.Parameter(0.02 * torch.randn(axes, dim, rank, generator=generator))

    def forward(self, x: Float[Tensor, "b n c"], size: Size | None = None, causal: bool = False) -> Tensor:
        if size is None:
            return x + self.along(0, x, causal)
        grid = rearrange(x, "b (h w) c -> b h w c", h=size[0])
        rows = rearrange(self.along(1, grid.flatten(0, 1), causal), "(b h) w c -> b (h w) c", h=size[0])
        columns = self.along(0, rearrange(grid, "b h w c -> (b w) h c"), causal)
        return x + rows + rearrange(columns, "(b w) h c -> b (h w) c", w=size[1])

    def along(self, axis: int, x: Float[Tensor, "b n c"], causal: bool) -> Float[Tensor, "b n c"]:
        """Sum over one axis, as linear attention with constant queries and keys and a head for each channel."""
        weight, fade = self.weight[axis][:, None], -torch.exp(self.log_rate[axis])[:, None]
        fq, decay = weight.expand(-1, x.shape[1], -1), fade.expand(-1, x.shape[1], -1)
        v = x.mT[..., None]
        state = v.new_zeros(*v.shape[:2], weight.shape[-1], 1)

        def past(v: Tensor) -> Tensor:
            return linear_forms.chunked(fq, torch.ones_like(fq), v, decay, state, 64)

        out = past(v)
        if not causal:  # both sums include the token
            out = out + past(v.flip(-2)).flip(-2) - weight.sum(-1, keepdim=True) * v
        return out.squeeze(-1).mT


@final
class LightNetLayer(StreamingLayer):
    """`RMSNorm(o) * silu(x W_g1 W_g2)`, times `W_o`, where o is LightNet's attention: O(N), one pass, no decay to tune.

    Args:
        dim: C. heads: H, a divisor of C.
        expand: width of queries and keys of a head; the release has 128.
        axes: 1 for sequences, 2 for grids, whose `size` a call then brings.
        lrpe: True rotates queries and keys by `MDLRPE`, which doubles their width. Such a layer, and one on a grid,
            does not stream.
        gate_rank: width between `W_g1` and `W_g2`.
        op: another operator in place of LightNet's, without `lrpe`.

    The norm is over all heads together, as in the release (eps 1e-6). On a grid "causal" is not defined.
    """

    capabilities = replace(Layer.capabilities, masks=frozenset({"keys"}), growth="N")

    def __init__(
        self, dim: int, heads: int, *, expand: int = 128, axes: Literal[1, 2] = 1, lrpe: bool = True,
        gate_rank: int = 128, op: Operator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("expand", expand, 1)
        validate.count("gate_rank", gate_rank, 1)
        validate.one_of("axes", axes, (1, 2))
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        if op is not None and lrpe:
            raise OptionError(f"lrpe=True must be False with op={op.name}, since it rotates LightNet's features")
        self.op = LightNetAttention() if op is None else op
        self.expand = expand
        can, grid = self.op.capabilities, axes == 2
        patterns = can.patterns & ({"self"} if grid else {"self", "causal self"})
        streams = can.streaming == "exact" and not lrpe and not grid
        self._declare(grid=grid, patterns=patterns, streaming="exact" if streams else None)
        self.q = nn.Linear(dim, heads * expand, bias=False)
        self.k = nn.Linear(dim, heads * expand, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.lrpe = MDLRPE(axes, heads, expand) if lrpe else None

    def _mix(
        self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, size: Size | None = None,
        **inputs: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = self._heads(x)
        if self.lrpe is None:
            return self._merged(self.op(q, k, v, mask=mask, causal=causal), x)
        return self._merged(self._rotated(self.lrpe, q, k, v, mask, causal, size), x)

    def _rotated(
        self, lrpe: MDLRPE, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, size: Size | None
    ) -> Tensor:
        assert isinstance(self.op, LightNetAttention)
        dtype, wide = v.dtype, accumulating(v.dtype)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        hidden = None if mask is None else ~masks.keys_of(mask, k.shape[0], k.shape[2])[:, None, :, None]
        if hidden is not None:
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        fk, decay = self.op.encode_keys(k, 1.0, causal, hidden, {})
        fk = fk if hidden is None else fk.masked_fill(hidden, 0.0)
        at = places(k.shape[2], size, k.device)
        fq, fk = lrpe(self.op.query_features(q, 1.0), at), lrpe(fk, at)
        if decay is None:
            return (fq @ (fk.mT @ v)).to(dtype)
        decay = torch.cat([decay, decay], -1).clamp_min(-100.0)  # a state decays to nothing after that
        state = v.new_zeros(*v.shape[:2], fk.shape[-1], v.shape[-1])
        return linear_forms.chunked(fq, fk, v, decay, state, self.op.block).to(dtype)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (rearrange(w(x), "b n (h d) -> b h n d", h=self.heads) for w in (self.q, self.k, self.v))
        return q, k, v

    def _merged(self, out: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(rearrange(out, "b h n d -> b n (h d)")) * F.silu(self.gate(x)))

    @property
    def _streaming_op(self) -> Streaming:
        assert isinstance(self.op, Streaming)  # implied by `capabilities.streaming`
        return self.op

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
        sizes = batch, self.heads, self.heads, self.expand, self.dim // self.heads
        return self._streaming_op.init_state(*sizes, dtype=dtype, device=device)

    def _step(self, x: Tensor, state: Any, **inputs: Tensor) -> tuple[Tensor, Any]:
        out, state = self._streaming_op.step(*self._heads(x), state)
        return self._merged(out, x), state

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, expand=6, gate_rank=5)


@final
class LightNet(nn.Module):
    """A network from tokens `(B, N, C)` to tokens: `MDTPE` once, then blocks of `LightNetLayer` and a gated MLP.

    Args:
        dim, depth, heads: width, blocks, and heads of each.
        axes: 1 for sequences, 2 for grids.
        tpe, lrpe: True encodes positions by `MDTPE`, and by `MDLRPE` in each layer. Without either (and without
            causality) the order of tokens has no effect.
        options: options of the layers.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, *, axes: Literal[1, 2] = 1, tpe: bool = True, lrpe: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("depth", depth, 1)
        layers = [LightNetLayer(dim, heads, axes=axes, lrpe=lrpe, **options) for _ in range(depth)]
        self.axes, self.tpe = axes, MDTPE(dim, axes) if tpe else None
        self.blocks, self.norm = nn.ModuleList(map(Block, layers)), nn.RMSNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"], size: Size | None = None, *, causal: bool = False) -> Tensor:
        """Return the tokens; `size` is the grid's `(H, W)`, for two axes."""
        if (size is not None) != (self.axes == 2):
            raise ShapeError(f"size={shown(size)} must be (H, W) for axes=2 and None for axes=1; got axes={self.axes}")
        call: dict[str, Any] = {"causal": causal} if size is None else {"size": size}
        x = x if self.tpe is None else self.tpe(x, size, causal)
        for block in self.blocks:
            x = block(x, **call)
        return self.norm(x)
