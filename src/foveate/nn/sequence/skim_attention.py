"""Skim-Attention: weights come from the page's layout alone, once for all layers.

Skim-Attention: Learning to Focus via Document Layout (2021), arXiv 2109.01078.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import safe_softmax

#: Coordinates are whole numbers in 0..1000; the release's tables have a few more rows.
LARGEST, TABLE = 1000, 1024


@final
class LayoutEmbedding(nn.Module):
    """Embeds boxes `(x0, y0, x1, y1)`: `LN(E_x[x0] + E_y[y0] + E_x[x1] + E_y[y1] + E_h[y1 - y0] + E_w[x1 - x0])`.

    Args:
        dim: width of the vectors.
        boxes: "full", or "centre" for `LN(E_x + E_y)` of the box's middle, an ablation.
    """

    def __init__(self, dim: int = 768, boxes: Literal["full", "centre"] = "full") -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.one_of("boxes", boxes, ("full", "centre"))
        self.boxes = boxes
        self.x, self.y = nn.Embedding(TABLE, dim), nn.Embedding(TABLE, dim)
        self.h = nn.Embedding(TABLE, dim) if boxes == "full" else None
        self.w = nn.Embedding(TABLE, dim) if boxes == "full" else None
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, bbox: Int[Tensor, "b n 4"]) -> Float[Tensor, "b n d"]:
        _check_boxes(bbox)
        left, top, right, bottom = bbox.unbind(-1)
        if self.boxes == "centre":
            return self.norm(self.x((left + right) // 2) + self.y((top + bottom) // 2))
        assert self.h is not None
        assert self.w is not None
        found = self.x(left) + self.y(top) + self.x(right) + self.y(bottom)
        return self.norm(found + self.h(bottom - top) + self.w(right - left))


@final
class SkimAttention(nn.Module):
    """Weights `(B, H, N, N)` of all tokens for all others, only from their boxes: `softmax(l W_q (l W_k)ᵀ / sqrt d)`.

    They are computed once and serve every layer (`Skimformer`), or restrict another model (`skimming_mask`). Words have
    no effect. Cost: two projections and one matrix O(N²), which is kept; the wrong choice for text without a layout,
    and for long pages, since the matrix is held in full (the paper's windowed form is not implemented).

    Args:
        layout_dim: width of the layout's vectors.
        heads: H.
        head_dim: d.
        boxes: see `LayoutEmbedding`.
    """

    def __init__(
        self, layout_dim: int = 768, heads: int = 12, head_dim: int = 64, *, boxes: Literal["full", "centre"] = "full"
    ) -> None:
        super().__init__()
        for name, value in (("layout_dim", layout_dim), ("heads", heads), ("head_dim", head_dim)):
            validate.count(name, value, 1)
        self.heads, self.head_dim = heads, head_dim
        self.layout = LayoutEmbedding(layout_dim, boxes)
        self.q, self.k = nn.Linear(layout_dim, heads * head_dim), nn.Linear(layout_dim, heads * head_dim)

    def forward(self, bbox: Int[Tensor, "b n 4"], mask: Tensor | None = None) -> Float[Tensor, "b h n n"]:
        """Return the weights; `mask` is bool `(B, 1, 1, N)`, True for real tokens. A row that sees none is zeros."""
        layout = self.layout(bbox)
        q, k = (part(layout).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k))
        scores = q @ k.mT * self.head_dim**-0.5
        if mask is not None:
            seen = _keys(mask, bbox.shape[0], bbox.shape[1], bbox.device)
            scores = scores.masked_fill(~seen[:, None, None], masks.NEG_INF)
        return safe_softmax(scores)


@final
class SkimLayer(nn.Module):
    """A layer without queries and keys: `h = LN(h + (A h W_v) W_o)`, then `h = LN(h + MLP(h))`.

    Args:
        dim: C.
        heads, head_dim: H and d of the values.
        hidden: hidden width of the MLP; None for `4 dim`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, hidden: int | None = None) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("heads", heads, 1)
        if head_dim is None and dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}, unless head_dim is given")
        head_dim = dim // heads if head_dim is None else head_dim
        validate.count("head_dim", head_dim, 1)
        hidden = 4 * dim if hidden is None else hidden
        validate.count("hidden", hidden, 1)
        self.heads = heads
        self.v, self.out = nn.Linear(dim, heads * head_dim), nn.Linear(heads * head_dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm, self.mlp_norm = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Float[Tensor, "b n c"], weights: Float[Tensor, "b h n n"]) -> Float[Tensor, "b n c"]:
        if weights.shape != (x.shape[0], self.heads, x.shape[1], x.shape[1]):
            expected = f"(B={x.shape[0]}, H={self.heads}, N={x.shape[1]}, N)"
            raise ShapeError(f"weights must be {expected}; got {tuple(weights.shape)}")
        v = self.v(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        x = self.norm(x + self.out((weights @ v).transpose(1, 2).flatten(2)))
        return self.mlp_norm(x + self.mlp(x))


@final
class Skimformer(nn.Module):
    """A network from words and boxes to tokens `(B, N, C)`: one `SkimAttention`, and layers that reuse its weights.

    Words have positions only through the weights. The release's dropout is left out.

    Args:
        vocab: number of words.
        dim, depth, heads: C, layers and H.
        layout_dim: width of the layout's vectors; None for `dim`.
        boxes: see `LayoutEmbedding`.
    """

    def __init__(
        self, vocab: int, dim: int = 768, depth: int = 12, heads: int = 12, *, layout_dim: int | None = None,
        boxes: Literal["full", "centre"] = "full",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("vocab", vocab), ("dim", dim), ("depth", depth), ("heads", heads)):
            validate.count(name, value, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.words, self.types = nn.Embedding(vocab, dim), nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.skim = SkimAttention(dim if layout_dim is None else layout_dim, heads, dim // heads, boxes=boxes)
        self.layers = nn.ModuleList(SkimLayer(dim, heads) for _ in range(depth))

    def forward(
        self, ids: Int[Tensor, "b n"], bbox: Int[Tensor, "b n 4"], mask: Tensor | None = None,
        types: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:  # fmt: skip
        """Return the tokens; `types` is 0 or 1 for each token (None for 0), and `mask` as for `SkimAttention`."""
        weights = self.skim(bbox, mask)
        x = self.norm(self.words(ids) + self.types(torch.zeros_like(ids) if types is None else types))
        for layer in self.layers:
            x = layer(x, weights)
        return x


def skimming_mask(weights: Float[Tensor, "b h n n"], top_k: int, mask: Tensor | None = None) -> Bool[Tensor, "b h n n"]:
    """Return each row's `top_k` keys of largest weight as a mask for another model's attention (True = may attend).

    Args:
        weights: the weights of a trained `SkimAttention`.
        top_k: keys for each row and head; N or more keeps all.
        mask: bool `(B, 1, 1, N)`: padding is never kept, so a row may keep fewer.
    """
    validate.count("top_k", top_k, 1)
    n = weights.shape[-1]
    kept = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    kept.scatter_(-1, weights.topk(min(top_k, n), -1).indices, True)
    return kept if mask is None else kept & _keys(mask, weights.shape[0], n, weights.device)[:, None, None]


def _keys(mask: Tensor, batch: int, n: int, device: torch.device) -> Bool[Tensor, "b n"]:
    validate.key_mask(mask, batch, n, device)
    return masks.keys_of(mask, batch, n)


def _check_boxes(bbox: Tensor) -> None:
    if bbox.dim() != 3 or bbox.shape[2] != 4 or bbox.is_floating_point():
        raise ShapeError(f"bbox must be whole numbers (B, N, 4); got {bbox.dtype} {tuple(bbox.shape)}")
    if bbox.numel() and not bool(((bbox >= 0) & (bbox <= LARGEST)).all()):
        raise ShapeError(f"bbox must lie in 0..{LARGEST}; got {int(bbox.min())}..{int(bbox.max())}")
    if not bool((bbox[..., :2] <= bbox[..., 2:]).all()):
        raise ShapeError("bbox must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1; got one that is not")
