"""CrossFormer's layers: embeddings of several scales, attention at short and long distance, a computed position bias.

CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (2021), arXiv 2108.00154.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size, filled
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.offsets import offsets
from foveate.nn.parts.window import Windows
from foveate.ops.dense.softmax import Softmax


@final
class CrossScaleEmbedding(nn.Module):
    """Convolutions of one stride and several kernel sizes, side by side: `(B, channels, H, W)` to `(B, dim, ...)`.

    All kernels are centred on the same patch of `stride x stride` pixels, so that each token holds features of several
    scales. The first kernel makes half of the channels, each further one half of the rest, and the last one all of the
    rest: large kernels cost more and get fewer. Zeros below and on the right first fill up the sides to a multiple of
    the stride.

    Args:
        channels: channels of the map.
        dim: channels of the embedding, a multiple of `2 ** (len(kernels) - 1)`.
        kernels: sides of the kernels, `stride` or larger by an even number.
        stride: pixels from one token to the next.

    Raises:
        OptionError: an option out of range.
    """

    def __init__(self, channels: int, dim: int, kernels: Sequence[int] = (4, 8, 16, 32), stride: int = 4) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("dim", dim), ("stride", stride)):
            validate.count(name, value, 1)
        if not kernels:
            raise OptionError("kernels=() must hold at least one kernel's side")
        for kernel in kernels:
            validate.count("kernels", kernel, stride)
            if (kernel - stride) % 2:
                raise OptionError(f"kernels={shown(tuple(kernels))} must differ from stride={stride} by even numbers")
        parts = 2 ** (len(kernels) - 1)
        if dim % parts:
            raise OptionError(f"dim={dim} must be a multiple of {parts} for {len(kernels)} kernels")
        halves = [dim >> (place + 1) for place in range(len(kernels) - 1)]
        self.channels, self.stride, self.widths = channels, stride, (*halves, dim // parts)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, kernel, stride, (kernel - stride) // 2)
            for kernel, width in zip(kernels, self.widths, strict=True)
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d r s"]:
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"images must be (B, {self.channels}, H, W); got {shown(images)}")
        images = filled(images, self.stride)
        return torch.cat([conv(images) for conv in self.convs], 1)


@final
class DynamicPositionBias(nn.Module):
    """The bias on the scores in a group, `MLP(row offset, column offset)`: a number for each head.

    The MLP runs once for each of the `(2h - 1) (2w - 1)` offsets of an `h x w` group, so that it serves groups of any
    size, which a table does not. It is linear, then three times LayerNorm, ReLU, linear.

    Args:
        dim, heads: C and H.
        width: hidden width of the MLP; None for C / 16, at least 2.
    """

    def __init__(self, dim: int, heads: int, width: int | None = None) -> None:
        super().__init__()
        validate.count("dim", dim, 1)
        validate.count("heads", heads, 1)
        width = max(2, dim // 16) if width is None else width
        validate.count("width", width, 2)  # the norm of a single number is a constant
        layers: list[nn.Module] = [nn.Linear(2, width)]
        for out in (width, width, heads):
            layers += [nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, group: Size) -> Float[Tensor, "h t t"]:
        weight = next(self.mlp.parameters())
        found = offsets(group, weight.device)
        return self.mlp(found.values.to(weight.dtype))[found.place].permute(2, 0, 1)


@final
class LongShortAttention(Layer):
    """Attention inside groups of G x G tokens of a grid, neighbours or evenly spaced ones: O(N G² C).

        softmax(q kᵀ / sqrt(C / H) + bias) v W_o, with a `DynamicPositionBias`

    "short" groups are windows of neighbours. "long" groups hold every I-th row and column of an area of `G I x G I`
    tokens; their bias counts offsets in steps of the interval. Blocks alternate between both: a short one and a long
    one with the default interval connect every pair of tokens, where G divides the map's sides and they are G² at most.
    The wrong choice for text, since groups see the future, and alone: one kind does not reach the whole map.

    Args:
        dim, heads: C and H, a divisor of C.
        group: G.
        kind: "short" or "long".
        interval: I of "long" groups; None for `ceil(side / G)` along each axis, which spreads a group over the whole
            map. The published networks have 8, 4 and 2 in their stages.
        fit: what happens on maps on which G or `G I` is too much. "map" has groups of `min(G, side)` tokens along each
            axis, and intervals of at most `ceil(side / G)`. "release" fills the map up to a multiple of `G I`; where
            the shorter side is at most G, its groups are windows of that side, of either kind. Both are the same on
            maps that `G I` divides, and on square maps of G rows or fewer, which are one group.
        padding: "hidden" masks the tokens that fill up the last groups, as the release does; "seen" attends to them.
            Their keys and values are the projection's biases.
        bias_width: see `DynamicPositionBias`.

    Raises:
        OptionError: an option out of range.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(
        self, dim: int, heads: int, group: int = 7, kind: Literal["short", "long"] = "short", *,
        interval: int | None = None, fit: Literal["map", "release"] = "map",
        padding: Literal["hidden", "seen"] = "hidden", bias_width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        validate.count("group", group, 1)
        validate.count("interval", 1 if interval is None else interval, 1)
        validate.one_of("kind", kind, ("short", "long"))
        validate.one_of("fit", fit, ("map", "release"))
        validate.one_of("padding", padding, ("hidden", "seen"))
        self.group, self.kind, self.interval, self.fit, self.padding = group, kind, interval, fit, padding
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = DynamicPositionBias(dim, heads, bias_width)
        self.op = Softmax()

    def groups(self, size: Size) -> Windows:
        """Return the groups of a map of `(H, W)` tokens."""
        group, shortest = self.group, min(size)
        if self.fit == "release":
            if shortest <= group:
                return Windows(size, (shortest, shortest))
            interval = 1 if self.kind == "short" else self.interval or -(-size[0] // group)
            return Windows(size, (group, group), (interval, interval))
        window = min(group, size[0]), min(group, size[1])
        if self.kind == "short":
            return Windows(size, window)
        rows, columns = (-(-side // group) for side in size)
        if self.interval is not None:
            rows, columns = min(self.interval, rows), min(self.interval, columns)
        return Windows(size, window, (rows, columns))

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        groups = self.groups(inputs["size"])
        q, k, v = (split(part, self.heads) for part in self.qkv(groups.partition(x)).chunk(3, -1))
        bias: Tensor | None = self.bias(groups.window)[None]
        if self.padding == "hidden" and any(groups.padding):
            real = groups.real(x.device)[:, None, None]
            hidden = masks.combine(bias, real)
            bias = None if hidden is None else hidden.repeat(x.shape[0], 1, 1, 1)
        return self.out(groups.merge(merge(self.op(q, k, v, mask=bias))))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 2, "long", bias_width=4)

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}
