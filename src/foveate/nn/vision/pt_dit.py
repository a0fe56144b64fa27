"""PT-DiT's block: proxies carry what is global, windows and shifted windows what is local, of an image or a video.

Qihoo-T2X: An Efficiency-Focused Diffusion Transformer via Proxy Tokens for Text-to-Any-Task (2024), arXiv 2409.04005.
"""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.parts.boxes import Boxes, Grid
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.vision.proxy_tokens import Mode, ProxyTokenAttention, bare_norm


@final
class TimeSlots(Checked, nn.Module):
    """Six vectors for a time of diffusion, which all blocks of a network share: `(B,)` to `(B, 6C)`.

    Sines and cosines of the time go through `linear, SiLU, linear, SiLU, linear`. This is PixArt's AdaLN-single.

    Args:
        dim: C.
        frequencies: number of sines and cosines together, even.
    """

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("frequencies", frequencies, 2)
        if frequencies % 2:
            raise OptionError(f"frequencies={frequencies} must be even")
        self.frequencies = frequencies
        self.embed = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.slots = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, times: Float[Tensor, " b"]) -> Float[Tensor, "b c6"]:
        half = self.frequencies // 2
        rates = torch.exp(torch.arange(half, device=times.device) * (-math.log(10_000) / half))
        angles = times.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.slots(self.embed(waves.to(next(self.parameters()).dtype)))


@final
class PTDiTBlock(Checked, nn.Module):
    """A block of a diffusion transformer on the tokens `(B, F H W, C)` of F frames with H rows and W columns.

        z += L_1 ProxyTokenAttention(z)
        z += gate * attention in windows(scale, shift of LN(z))
        z += L_2 (gate * attention in windows shifted by half their sides(scale, shift of LN(z)))
        z += cross_attention(z, text)
        z += gate * MLP(scale, shift of LN(z))

    L_1 and L_2 are linear maps that start at zero, so that a new block has attention in plain windows alone. Shift,
    scale and gate are those of the time of diffusion, which `TimeSlots` makes, plus learned vectors of the block.
    Shifted windows get other learned vectors, and the same time. Cost: O(N M C) for M windows, and O(N t C) for the
    windows' t tokens, in place of O(N² C).

    Args:
        dim, heads: C and H, a divisor of C.
        window, proxy, generator: see `ProxyTokenAttention`.
        text_dim: width of the text's tokens; None for a block without text. A linear map brings another width to C.
        mlp_ratio: hidden width of the MLP over C.

    Raises:
        OptionError: an option out of range.

    Order, zeros and norms are those of the release in MindSpeed-MM; the paper's own repository holds no code. There,
    examples of a batch with different times get each other's: here each gets its own. Its queries and keys have no
    norms. Grids that windows do not divide, which it refuses, are filled up and masked.
    """

    def __init__(
        self, dim: int, heads: int, window: Grid = (1, 4, 4), *, proxy: Mode = "mean", text_dim: int | None = None,
        mlp_ratio: float = 4.0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.at_least("mlp_ratio", mlp_ratio, 1 / dim if dim else 1)
        validate.count("text_dim", 1 if text_dim is None else text_dim, 1)
        self.dim, self.window, self.text_dim = dim, window, text_dim
        self.proxies = ProxyTokenAttention(dim, heads, window, proxy=proxy, generator=generator)
        self.windows = MultiHeadAttention(dim, heads, bias=True)
        self.shifted = MultiHeadAttention(dim, heads, bias=True)
        self.from_proxies, self.from_shifted = _zero_linear(dim), _zero_linear(dim)
        self.text = None if text_dim is None else MultiHeadAttention(dim, heads, bias=True)
        self.text_in = nn.Identity() if text_dim in (None, dim) else nn.Linear(text_dim or dim, dim)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.slots = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.shifted_slots = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    def forward(
        self, z: Float[Tensor, "b n c"], grid: Grid, times: Float[Tensor, "b c6"],
        text: Float[Tensor, "b m d"] | None = None, text_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:  # fmt: skip
        """Return the tokens after the block.

        Args:
            z: tokens, frame by frame and row by row.
            grid: `(F, H, W)`.
            times: the six vectors of each example's time.
            text: tokens of the text, which a block with `text_dim` requires.
            text_mask: True for the text's real tokens; None if all are.

        Raises:
            ShapeError: a malformed call.
        """
        self._check(z, grid, times, text, text_mask)
        time = times.unflatten(-1, (6, -1))
        slots, shifted = (self.slots + time).unbind(1), (self.shifted_slots + time[:, :3]).unbind(1)
        z = z + self.from_proxies(self.proxies.over(z, grid))
        z = z + self._in_windows(z, Boxes.fitting(grid, self.window), self.windows, slots[:3])
        boxes = Boxes.fitting(grid, self.window, shifted=True)
        z = z + self.from_shifted(self._in_windows(z, boxes, self.shifted, shifted))
        if self.text is not None and text is not None:
            seen = None if text_mask is None else text_mask[:, None, None]
            z = z + self.text(z, self.text_in(text), mask=seen)
        return z + slots[5][:, None] * self.mlp(_modulated(z, *slots[3:5]))

    def _in_windows(
        self, z: Tensor, boxes: Boxes, attention: MultiHeadAttention, slots: tuple[Tensor, ...]
    ) -> Float[Tensor, "b n c"]:
        shift, scale, gate = slots
        mask = boxes.mask(z.device)
        if mask is not None:
            mask = mask.repeat(z.shape[0], 1, 1)[:, None]
        found = attention(boxes.partition(_modulated(z, shift, scale)), mask=mask)
        return gate[:, None] * boxes.merge(found)

    def _check(self, z: Tensor, grid: Grid, times: Tensor, text: Tensor | None, text_mask: Tensor | None) -> None:
        if not isinstance(z, Tensor) or z.dim() != 3 or z.shape[-1] != self.dim:
            raise ShapeError(f"z must be (B, N, C={self.dim}); got {shown(z)}")
        if len(grid) != 3 or math.prod(grid) != z.shape[1]:
            raise ShapeError(f"grid={shown(grid)} must be (F, H, W) with F * H * W = N = {z.shape[1]}")
        if not isinstance(times, Tensor) or times.shape != (len(z), 6 * self.dim):
            raise ShapeError(f"times must be (B={len(z)}, 6C={6 * self.dim}); got {shown(times)}")
        if (self.text is None) != (text is None):
            wanted = "left out" if self.text is None else f"(B, M, {self.text_dim})"
            raise ShapeError(f"text must be {wanted} for text_dim={self.text_dim}; got {shown(text)}")
        if text is not None and (text.dim() != 3 or (text.shape[0], text.shape[2]) != (len(z), self.text_dim)):
            raise ShapeError(f"text must be (B={len(z)}, M, {self.text_dim}); got {shown(text)}")
        if text is not None and text_mask is not None:
            validate.bool_mask("text_mask", text_mask, "B, T", tuple(text.shape[:2]), text.device)


def _zero_linear(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _modulated(z: Float[Tensor, "b n c"], shift: Float[Tensor, "b c"], scale: Float[Tensor, "b c"]) -> Tensor:
    return bare_norm(z) * (1 + scale[:, None]) + shift[:, None]
