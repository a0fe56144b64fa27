"""Proxy tokens: one token of each window stands for it in attention over the whole image or video.

Qihoo-T2X: An Efficiency-Focused Diffusion Transformer via Proxy Tokens for Text-to-Any-Task (2024), arXiv 2409.04005.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.layer import Layer
from foveate.nn.parts.boxes import Boxes, Grid
from foveate.nn.parts.multi_head import MultiHeadAttention

Mode = Literal["mean", "random"]


def proxy_tokens(
    z: Float[Tensor, "b f h w c"], window: Grid, mode: Mode = "mean", generator: torch.Generator | None = None
) -> Float[Tensor, "b m c"]:
    """Return one token for each window of a grid: the mean of its tokens, or one of them drawn at random.

    Args:
        z: tokens of F frames with H rows and W columns; an image has one frame.
        window: `(t, h, w)`. Windows at the end of an axis hold what is left of it.
        mode: "mean" or "random"; each example and each call draws anew.
        generator: draws the tokens; "random" requires it.

    Raises:
        OptionError, ShapeError: a malformed call.
    """
    if not isinstance(z, Tensor) or z.dim() != 5:
        raise ShapeError(f"z must be (B, F, H, W, C); got {shown(z)}")
    check_window(window)
    validate.one_of("mode", mode, ("mean", "random"))
    boxes = Boxes.fitting((z.shape[1], z.shape[2], z.shape[3]), window)
    real = boxes.real(z.device).repeat(z.shape[0], 1)
    tokens = boxes.partition(z.flatten(1, 3))
    if mode == "mean":
        found = tokens.sum(1) / real.sum(1, keepdim=True)
    else:
        if generator is None:
            raise OptionError('generator=None must be a torch.Generator for mode="random"')
        drawn = torch.rand(real.shape, generator=generator, device=generator.device).to(z.device)
        at = drawn.masked_fill(~real, -1.0).argmax(1)
        found = torch.take_along_dim(tokens, at[:, None, None], 1)[:, 0]
    return found.unflatten(0, (z.shape[0], -1))


@final
class ProxyTokenAttention(Layer):
    """Attention of every token to one proxy of each window: O(N M C) for M windows.

        p = proxy_tokens(x);  p += attention(LN(p));  out = cross_attention(queries=LN(x), keys and values=LN(p))

    Proxies exchange what they know, and all tokens read it, coarsely. A query reads M keys in place of N. For windows
    of one size that is still quadratic; the paper lets windows grow with the image. Detail is lost inside a window, so
    that `PTDiTBlock` adds attention in windows. With windows of one token this is full self-attention, followed by full
    cross-attention to its output. The wrong choice for text, since it sees the future.

    Args:
        dim, heads: C and H, a divisor of C.
        window: `(t, h, w)`. The paper has t = 1 for images, and h and w of 2, 4, 8 and 16 for 256, 512, 1024 and 2048
            pixels; t = 4 for videos.
        proxy: "mean", as in the release and the paper's later versions, or "random", as in its first version: training
            draws one token of each window, evaluation takes the mean.
        generator: draws the proxies of "random", which requires it.

    Raises:
        OptionError: an option out of range.

    The norms have no parameters. Models that keep several proxies of a window, which the release can, are left out.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True)

    def __init__(
        self, dim: int, heads: int, window: Grid = (1, 4, 4), *, proxy: Mode = "mean",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        check_window(window)
        validate.one_of("proxy", proxy, ("mean", "random"))
        if (proxy == "random") != (generator is not None):
            raise OptionError('generator must come with proxy="random", and only with it')
        self.window, self.proxy, self.generator = window, proxy, generator
        self.among = MultiHeadAttention(dim, heads, bias=True)
        self.reading = MultiHeadAttention(dim, heads, bias=True)

    def proxies(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b m c"]:
        """Return the proxies of the tokens of F frames, H rows and W columns, before and without attention."""
        mode: Mode = self.proxy if self.training else "mean"
        return proxy_tokens(x.unflatten(1, grid), self.window, mode, self.generator)

    def over(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Return the layer's output for the tokens of F frames, H rows and W columns."""
        p = self.proxies(x, grid)
        p = p + self.among(bare_norm(p))
        return self.reading(bare_norm(x), bare_norm(p))

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return self.over(x, (1, *inputs["size"]))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, (1, 2, 2))

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


def bare_norm(x: Float[Tensor, "*s c"]) -> Float[Tensor, "*s c"]:
    """Apply a LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def check_window(window: object) -> None:
    """Refuse a window that is not three sides."""
    if not isinstance(window, tuple) or len(window) != 3:
        raise OptionError(f"window={shown(window)} must be (frames, rows, columns)")
    for side in window:
        validate.count("window", side, 1)
