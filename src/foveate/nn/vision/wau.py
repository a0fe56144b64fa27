"""Window attention upsampling: fine pixels of a skip connection attend to the coarse map that is to be enlarged.

More than Encoder: Introducing Transformer Decoder to Upsample (2021), arXiv 2106.10637.
"""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.parts.blocks import gelu_mlp
from foveate.nn.parts.grid import Size, to_map, to_tokens
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.window import WindowAttention, Windows
from foveate.ops.dense.softmax import Softmax


@final
class WindowAttentionUpsample(Checked, nn.Module):
    """Twice as fine a map, `bilinear(P low) + decoder(S skip, P low)`, for the decoder of a U-Net.

    P and S are linear maps of each pixel to `dim` channels, and the decoder is a `WindowAttentionDecoder`: the fine
    pixels of the skip connection say where detail belongs, and the coarse map says what it is. It takes the place of
    bilinear upsampling or of a transposed convolution. Cost O(N m² C + N C²) for N
    fine pixels, without an N x N matrix. With a window as large as the map each fine pixel attends to the whole coarse
    map. The wrong choice where no finer map exists, or where the finer map is noise.

    Args:
        low_dim: channels of the coarse map.
        skip_dim: channels of the fine map.
        dim: channels of the output.
        heads, window, self_attn, mlp_ratio: see `WindowAttentionDecoder`.

    Raises:
        OptionError: an option out of range.

    In our small test it gains much over both where the skip connection goes no other way, and nothing beside a
    concatenation.

    The paper's text and code were out of reach. Its abstract states the attention from fine to coarse pixels, the
    windows, and the bilinear residual; heads, norms, the position bias and the MLP's form are ours. With an output
    projection of zeros the layer is the bilinear residual alone. The paper's form for volumes is left out.
    """

    def __init__(
        self, low_dim: int, skip_dim: int, dim: int, heads: int = 4, window: int = 7, self_attn: bool = False, *,
        mlp_ratio: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("low_dim", low_dim), ("skip_dim", skip_dim), ("dim", dim)):
            validate.count(name, value, 1)
        self.low, self.skip = nn.Linear(low_dim, dim), nn.Linear(skip_dim, dim)
        self.decoder = WindowAttentionDecoder(dim, heads, window, self_attn, mlp_ratio=mlp_ratio)

    def forward(self, low: Float[Tensor, "b c1 h w"], skip: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, "b d h2 w2"]:
        """Return a map of the size of `skip`.

        Args:
            low: the coarse map. Its sides are half those of `skip`, rounded up or down if odd; where they are rounded
                down, its last row or column counts twice.
            skip: the fine map.

        Raises:
            ShapeError: maps of other channels or sides.
        """
        self._check(low, skip)
        height, width = skip.shape[2:]
        coarse = halved((height, width))
        below, right = coarse[0] - low.shape[2], coarse[1] - low.shape[3]
        if below or right:
            low = F.pad(low, (0, right, 0, below), mode="replicate")
        y, s = self.low(to_tokens(low)), self.skip(to_tokens(skip))
        enlarged = F.interpolate(to_map(y, coarse), scale_factor=2.0, mode="bilinear")[:, :, :height, :width]
        return enlarged + to_map(self.decoder(s, y, (height, width)), (height, width))

    def _check(self, low: Tensor, skip: Tensor) -> None:
        for name, x, channels in (("low", low, self.low.in_features), ("skip", skip, self.skip.in_features)):
            is_map = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4 and 0 not in x.shape[2:]
            if not is_map or x.shape[1] != channels:
                raise ShapeError(f"{name} must be a map (B, {channels}, H, W) of real numbers; got {shown(x)}")
        halves = all(b in (a // 2, -(-a // 2)) for a, b in zip(skip.shape[2:], low.shape[2:], strict=True))
        if low.shape[0] != skip.shape[0] or not halves:
            raise ShapeError(
                f"low must have the batch of skip and half its sides, as (B, C, h, w) beside (B, C, 2h, 2w); "
                f"got {tuple(low.shape)} beside {tuple(skip.shape)}"
            )


@final
class WindowAttentionDecoder(Checked, nn.Module):
    """`a + MLP(norm(a))` with `a = softmax(q kᵀ / sqrt(D) + bias) v W_o`, from fine queries to coarse keys in windows.

    The coarse map is cut into windows of m x m pixels, and the fine one into windows of the same regions, 2m x 2m
    pixels. Queries come from the norm of the fine pixels; keys and values from that of the coarse pixels. The MLP and
    its norm have no biases, so that an attention of zeros gives zeros.

    Args:
        dim, heads: C and H, a divisor of C.
        window: m; a smaller map is one window.
        self_attn: True lets fine pixels attend to each other first, inside their windows and with a residual, as in
            the decoder of a Transformer.
        mlp_ratio: hidden width of the MLP over C.

    Raises:
        OptionError: an option out of range.
    """

    def __init__(
        self, dim: int, heads: int = 4, window: int = 7, self_attn: bool = False, *, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("window", window, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.heads, self.window = heads, window
        self.self_norm = nn.LayerNorm(dim) if self_attn else None
        self.self_attn = WindowAttention(dim, heads, 2 * window, padding="hidden") if self_attn else None
        self.query_norm, self.key_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.bias = _FineOffsetBias(heads, window)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, bias=False), gelu_mlp(dim, mlp_ratio, bias=False)
        self.op = Softmax()

    def forward(self, fine: Float[Tensor, "b n c"], coarse: Float[Tensor, "b m c"], size: Size) -> Tensor:
        """Return what each fine pixel reads.

        Args:
            fine: pixels of the fine map, row by row.
            coarse: pixels of the coarse map, which has half the sides, rounded up.
            size: `(H, W)` of the fine map.
        """
        if self.self_attn is not None and self.self_norm is not None:
            fine = fine + self.self_attn(self.self_norm(fine), size=size)
        queries, keys = self._windows(size)
        q = split(queries.partition(self.q(self.query_norm(fine))), self.heads)
        k, v = (split(x, self.heads) for x in keys.partition(self.kv(self.key_norm(coarse))).chunk(2, -1))
        bias: Tensor | None = self.bias(keys.window)[None]
        if any(keys.padding):
            bias = masks.combine(bias, keys.real(q.device)[:, None, None])
            bias = None if bias is None else bias.repeat(fine.shape[0], 1, 1, 1)
        read = self.out(queries.merge(merge(self.op(q, k, v, mask=bias))))
        return read + self.mlp(self.mlp_norm(read))

    def _windows(self, size: Size) -> tuple[Windows, Windows]:
        """Return the windows of the fine and those of the coarse map; each of them covers the same region."""
        coarse = halved(size)
        m, n = (min(self.window, side) for side in coarse)
        return Windows(size, (2 * m, 2 * n)), Windows(coarse, (m, n))


@final
class _FineOffsetBias(nn.Module):
    """A learned number for each head and each offset between a fine query and a coarse key of a window.

    A fine pixel i lies `(i - 2 j) / 2 - 1/4` coarse pixels behind the coarse pixel j, so that a window of m coarse
    pixels has `4 m - 2` offsets along each axis.
    """

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty(4 * window - 2, 4 * window - 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, window: Size) -> Float[Tensor, "h q k"]:
        rows, columns = (self._places(side) for side in window)
        found = self.table[rows[:, None, :, None], columns[None, :, None, :]]
        return rearrange(found, "i j r s h -> h (i j) (r s)")

    def _places(self, side: int) -> Tensor:
        device = self.table.device
        apart = torch.arange(2 * side, device=device)[:, None] - 2 * torch.arange(side, device=device)
        return apart + 2 * (self.window - 1)


def halved(size: Size) -> Size:
    """Return half of the sides of a map, rounded up."""
    return -(-size[0] // 2), -(-size[1] // 2)
