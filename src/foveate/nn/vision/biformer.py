"""Bi-level routing attention: each region of a map attends to the few regions that match it best.

BiFormer: Vision Transformer with Bi-Level Routing Attention (2023), arXiv 2303.08810.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import DepthwiseConv, Size
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.window import Windows
from foveate.ops.dense.softmax import Softmax


@final
class BiLevelRoutingAttention(Layer):
    """`(softmax(q K_rᵀ · scale) V_r + conv(v)) W_o`, where K_r, V_r are the tokens of the regions routed to q's region.

    A map is cut into about `n_win x n_win` regions. The mean query of a region is compared with the mean keys of all
    regions, and its tokens attend to the tokens of the `topk` best ones; all heads share this choice. Queries and keys
    are detached for the choice: they learn through the attention alone. With K routes to regions of t tokens the cost
    is O(N K t C), and O(R² C) for the choice among R regions. It is least, O(N^(4/3) C), where t is about `(2 N / K) **
    (1 / 3)`. Only the routed regions are copied and read. The wrong choice if what a token needs differs from its
    neighbours' needs, since they share one route, and for text: it sees the future.

    Args:
        dim, heads: C and H, a divisor of C.
        n_win: regions along each side. A region has `max(1, H // n_win)` rows and `max(1, W // n_win)` columns, so that
            sides which `n_win` does not divide have more regions (8 for 30 rows and `n_win=7`), and small maps fewer.
        topk: the regions that a region attends to; None, or more than there are, for all of them.
        side_dwconv: side of the depthwise convolution of the values, odd; 0 removes it.
        scale: factor on the dot products; None for `(C / H) ** -0.5`. The release has `C ** -0.5`.
        padding: "hidden" masks the tokens that fill up the last regions; "seen" attends to them, as the release does.
            Their keys and values are zeros.

    Raises:
        OptionError: an option out of range.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N²")

    def __init__(
        self, dim: int, heads: int = 8, n_win: int = 7, topk: int | None = 4, *, side_dwconv: int = 5,
        scale: float | None = None, padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        _check_routing(n_win, topk)
        validate.count("side_dwconv", side_dwconv, 0)
        validate.one_of("padding", padding, ("hidden", "seen"))
        self.n_win, self.topk, self.padding = n_win, topk, padding
        self.scale = validate.scale(scale, dim // heads)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.local = DepthwiseConv(dim, side_dwconv) if side_dwconv else None
        self.op = Softmax()

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size: Size = inputs["size"]
        windows = regions(size, self.n_win)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self._sees_all(windows):
            out = merge(self.op(*(split(part, self.heads) for part in (q, k, v)), scale=self.scale))
        else:
            out = self._routed(q, k, v, windows)
        if self.local is not None:
            out = out + self.local(v, size)
        return self.out(out)

    def _sees_all(self, windows: Windows) -> bool:
        """Return True if each query sees each token of the map and nothing else."""
        few = self.topk is None or self.topk >= windows.counts[0] * windows.counts[1]
        return few and (self.padding == "hidden" or not any(windows.padding))

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
        chosen = _routes(q, k, windows, self.topk)
        batch, count, _ = chosen.shape
        first = torch.arange(0, batch * count, count, device=q.device)
        rows = (chosen + first[:, None, None]).flatten()  # of the regions of the whole batch
        k, v = (
            windows.partition(x).index_select(0, rows).unflatten(0, (batch * count, -1)).flatten(1, 2) for x in (k, v)
        )
        seen = None
        if self.padding == "hidden" and any(windows.padding):
            seen = windows.real(q.device)[chosen].flatten(0, 1).flatten(1)[:, None, None]
        heads = (split(part, self.heads) for part in (windows.partition(q), k, v))
        return windows.merge(merge(self.op(*heads, mask=seen, scale=self.scale)))

    def routes(self, x: Float[Tensor, "b n c"], size: Size) -> Int[Tensor, "b r k"]:
        """Return the regions that each region attends to, best first; regions are numbered row by row."""
        self._check(x, None, None, False, size, {})
        q, k, _ = self.qkv(x).chunk(3, -1)
        return _routes(q, k, regions(size, self.n_win), self.topk)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 2, 2, side_dwconv=3)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


def regions(size: Size, n_win: int) -> Windows:
    """Return the regions of a map: `n_win` along each side, more if that does not divide it, fewer if it is shorter."""
    return Windows(size, (max(1, size[0] // n_win), max(1, size[1] // n_win)))


def bi_level_route(
    q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"], size: Size, n_win: int = 7, topk: int | None = 4
) -> Int[Tensor, "b r k"]:
    """Return the `topk` regions for each region of a map, best first, by the dot products of their mean q and k.

    Args:
        q, k: queries and keys of all heads together, `(B, N, C)`, row by row. The choice carries no gradient.
        size: `(H, W)`, with `H * W = N`.
        n_win, topk: see `BiLevelRoutingAttention`.
    """
    _check_routing(n_win, topk)
    if q.dim() != 3 or q.shape != k.shape or size[0] * size[1] != q.shape[1]:
        raise ShapeError(
            f"q and k must be (B, N, C) with N = H * W of size={shown(size)}; got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    return _routes(q, k, regions(size, n_win), topk)


def _routes(q: Tensor, k: Tensor, windows: Windows, topk: int | None) -> Tensor:
    count = windows.counts[0] * windows.counts[1]
    tokens = windows.real(q.device).sum(1)[:, None]  # added tokens are no part of the mean

    def means(x: Tensor) -> Tensor:
        return windows.partition(x.detach()).sum(1).unflatten(0, (-1, count)) / tokens.to(x.dtype)

    affinity = means(q) @ means(k).mT
    return affinity.topk(count if topk is None else min(topk, count), dim=-1).indices


def _check_routing(n_win: int, topk: int | None) -> None:
    validate.count("n_win", n_win, 1)
    validate.count("topk", 1 if topk is None else topk, 1)
