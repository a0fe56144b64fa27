"""Halo attention: the queries of a block of pixels share one neighbourhood, the block and a halo around it.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones (2021), arXiv 2103.12731.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import to_map, to_tokens
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.linear_maps import Linear
from foveate.nn.parts.offsets import relative_scores
from foveate.nn.parts.window import Windows
from foveate.ops.dense.softmax import Softmax


@final
class HaloAttention(Layer):
    """Blocks of b x b tokens attend to the (b + 2h) x (b + 2h) tokens around them: O(N (b + 2h)² C).

        logits[i, j] = q_i k_j / sqrt(D) + q_i (r_row[row_j - row_i] + r_column[column_j - column_i])

    It takes the place of a 3x3 convolution in a residual network; `stride=2` that of a strided one. Blocks make local
    attention fast, and cost some translation equivariance: shifts by b shift the output, other shifts change it. With
    `block=1` each token attends to the square of side `2h + 1` around it; with `halo=0` this is window attention; with
    one block over the whole grid, global attention. There is no output projection: the next 1x1 convolution is one. The
    wrong choice if distant tokens have to be compared, or for text, since it sees the future.

    Args:
        dim: C, the width of tokens in and out.
        heads: H, a divisor of C; a head's values are `C / H` wide.
        block: b.
        halo: h.
        head_dim: D, width of a head's queries and keys.
        stride: s; only every s-th row and column of queries is computed: the output has `ceil(H / s) x ceil(W / s)`
            tokens, at `1 / s²` of the attention's cost. It divides b, unless `pool`.
        pool: True computes all queries, and averages squares of s x s outputs.
        relative: False leaves out `r_row` and `r_column`, two tables of `2 (b + 2h) - 1` vectors.
        bias: True gives queries, keys and values biases.
        padding: blocks and halos reach over the grid's edges. "hidden" masks keys off the grid; "seen" attends to them:
            their keys and values are zero, but relative positions still raise or lower them, as in the paper.

    There is no official code. timm's port agrees for `stride=1` and `padding="seen"`, with its tables shifted by h. For
    another stride its relative positions count queries, not rows, so that the two differ.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(
        self, dim: int, heads: int, block: int = 8, halo: int = 3, head_dim: int = 16, *, stride: int = 1,
        pool: bool = False, relative: bool = True, bias: bool = False, padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        for name, value, least in (
            ("block", block, 1), ("halo", halo, 0), ("head_dim", head_dim, 1), ("stride", stride, 1),
        ):  # fmt: skip
            validate.count(name, value, least)
        validate.one_of("padding", padding, ("hidden", "seen"))
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        if block % stride and not pool:
            raise OptionError(f"stride={stride} must divide block={block}, unless pool=True")
        self.block, self.halo, self.head_dim, self.padding = block, halo, head_dim, padding
        self.stride, self.pool = (1, stride) if pool else (stride, 1)
        self.op = Softmax()
        self.q = Linear(dim, heads * head_dim, bias=bias)
        self.kv = Linear(dim, heads * head_dim + dim, bias=bias)
        for projection in (self.q, self.kv):
            nn.init.trunc_normal_(projection.weight, std=dim**-0.5)
        offsets = 2 * (block + 2 * halo) - 1
        self.rows, self.columns = (
            nn.Parameter(head_dim**-0.5 * torch.randn(offsets, head_dim)) if relative else None for _ in range(2)
        )

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size, side = inputs["size"], (self.block, self.block)
        blocks = Windows(size, side)
        q = blocks.partition(self.q(x)).unflatten(1, side)[:, :: self.stride, :: self.stride]
        kv = blocks.around(self.kv(x), self.halo)
        k, v = (split(part, self.heads) for part in kv.split([self.heads * self.head_dim, self.dim], -1))
        queries = rearrange(q, "x i j (h d) -> x h i j d", h=self.heads)
        seen = None
        if self.padding == "hidden" and (self.halo or any(blocks.padding)):
            seen = blocks.real(x.device, self.halo).repeat(x.shape[0], 1)[:, None, None]
        out = merge(self.op(queries.flatten(2, 3), k, v, mask=masks.combine(seen, self._positions(queries))))
        fewer = Windows((-(-size[0] // self.stride), -(-size[1] // self.stride)), (q.shape[1], q.shape[2]))
        out = fewer.merge(out)
        if self.pool == 1:
            return out
        return to_tokens(F.avg_pool2d(to_map(out, size), self.pool, ceil_mode=True))

    def _positions(self, q: Float[Tensor, "x h i j d"]) -> Float[Tensor, "x h q k"] | None:
        """Return what relative positions add to the logits."""
        if self.rows is None or self.columns is None:
            return None
        window = self.block + 2 * self.halo
        query = torch.arange(0, self.block, self.stride, device=q.device) + self.halo
        offset = torch.arange(window, device=q.device) - query[:, None] + window - 1
        return relative_scores(q, [self.rows[offset], self.columns[offset]])

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 2, 1, 3)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}
