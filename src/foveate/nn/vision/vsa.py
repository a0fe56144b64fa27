"""Varied-size window attention: queries of fixed windows read keys from windows whose place and size they predict.

VSA: Learning Varied-Size Window Attention in Vision Transformers (2022), arXiv 2204.08446.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.parts.grid import Size, to_map
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.offsets import OffsetBias
from foveate.nn.parts.window import Windows
from foveate.ops.dense.softmax import Softmax

#: The share of a sampled point that has to lie on the map; less is rounding.
LEAST = 1e-6
#: The score of a point that does not lie on the map: its weight is 0 in every dtype.
HIDDEN = -1e3


class TargetWindows(NamedTuple):
    """The windows that keys are sampled from, in tokens; both are `(B, heads, nH, nW, 2)`, rows first.

    Attributes:
        centres: rows and columns of the centres; the first token is at (0, 0).
        sizes: heights and widths; a negative one mirrors the window.
    """

    centres: Float[Tensor, "b h r s 2"]
    sizes: Float[Tensor, "b h r s 2"]


@final
class VariedSizeWindowAttention(Layer):
    """`softmax(q k_sᵀ / sqrt(C / H) + bias) v_s W_o` in windows of w x w queries, whose keys are sampled elsewhere.

    For each window and head, the mean token predicts an offset O and a scale R, through a LeakyReLU and a linear map
    each. Keys and values are read at the w x w points `centre + u (1 + R) + O`, where u are the positions of the
    window's tokens around its centre, by linear interpolation between four tokens. O and R start at 0: a new layer is
    window attention. It replaces window attention in networks that are trained from scratch, and needs no shifted
    windows. Cost O(N w² C), and four reads of each key and value. The wrong choice where windows hardly see the same
    objects, as with one token each, and for text: it sees the future.

    Args:
        dim, heads: C and H, a divisor of C.
        window_size: w.
        rel_pos: True adds a learned bias for each head and each offset between query and key in the original window.
        padding: tokens that fill up the last windows, and points outside the map. "hidden" leaves them out: the mean
            token is that of the map's tokens, a point's key and value are means over the map's tokens next to it, and
            it counts by the share of it that lies on the map. "seen" reads zeros there, as the release does.

    Raises:
        OptionError: an option out of range.

    As in the release, O is a share of the filled-up map's half side, divided by the number of whole windows along the
    side. The paper puts a residual depthwise 7x7 convolution before each such layer: `foveate.nn.DepthwiseConv`.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), grid=True, growth="N")

    def __init__(
        self, dim: int, heads: int, window_size: int = 7, *, rel_pos: bool = True,
        padding: Literal["hidden", "seen"] = "hidden",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        validate.count("window_size", window_size, 1)
        validate.flag("rel_pos", rel_pos)
        validate.one_of("padding", padding, ("hidden", "seen"))
        self.window_size, self.padding = window_size, padding
        self.offset, self.scale = nn.Linear(dim, 2 * heads), nn.Linear(dim, 2 * heads)
        for branch in (self.offset, self.scale):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = OffsetBias(heads, (window_size, window_size)) if rel_pos else None
        self.op = Softmax()

    def target_windows(self, x: Float[Tensor, "b n c"], size: Size) -> TargetWindows:
        """Return the windows that each window's queries read."""
        self._check(x, None, None, False, size, {})
        windows = self._windows(size)
        found = self._targets(x, windows)
        return TargetWindows(*(part.unflatten(2, windows.counts) for part in found))

    def _windows(self, size: Size) -> Windows:
        return Windows(size, (self.window_size, self.window_size))

    def _targets(self, x: Tensor, windows: Windows) -> TargetWindows:
        """Return centres and sizes `(B, heads, windows, 2)`."""
        w, (rows, columns) = self.window_size, windows.counts
        count = rows * columns
        tokens = windows.real(x.device).sum(1)[:, None] if self.padding == "hidden" else w * w
        means = windows.partition(x).sum(1).unflatten(0, (-1, count)) / tokens
        means = F.leaky_relu(means.to(x.dtype))

        def predicted(branch: nn.Linear) -> Tensor:  # columns come first, as in the release
            found = branch(means).unflatten(2, (self.heads, 2)).transpose(1, 2).flip(-1)
            return found.to(torch.promote_types(found.dtype, torch.float32))  # a place needs more than 8 bits

        offset, scale = predicted(self.offset), predicted(self.scale)
        whole = [max(1, side // w) for side in windows.size]
        unit = [(count * w - 1) / 2 / each for count, each in zip(windows.counts, whole, strict=True)]
        at = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device))
        centres = at.to(offset.dtype) * w + (w - 1) / 2
        return TargetWindows(centres + offset * offset.new_tensor(unit), w * (1 + scale))

    def _points(self, targets: TargetWindows) -> Tensor:
        """Return the positions to sample, rows and columns in tokens, `(B, heads, windows, T, 2)`."""
        w = self.window_size
        steps = torch.arange(w, device=targets.centres.device, dtype=targets.centres.dtype) - (w - 1) / 2
        around = torch.cartesian_prod(steps, steps)
        return targets.centres[..., None, :] + around * (targets.sizes / w)[..., None, :]

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        size: Size = inputs["size"]
        windows = self._windows(size)
        q, k, v = self.qkv(x).chunk(3, -1)
        points = self._points(self._targets(x, windows))
        ones = x.new_ones(x.shape[0], x.shape[1], self.heads)
        k, v, share = (_sampled(part, points, size) for part in (k, v, ones))
        q, scale = split(windows.partition(q), self.heads), (self.dim // self.heads) ** -0.5
        if self.padding == "hidden":
            k, v = (part / share.clamp_min(LEAST) for part in (k, v))
            # one more channel adds the logarithm of the share to the scores: a bias would be as large as all scores
            counts = torch.where(share > LEAST, share.clamp_min(LEAST).log(), HIDDEN) / scale
            q, k, v = F.pad(q, (0, 1), value=1.0), torch.cat([k, counts], -1), F.pad(v, (0, 1))
        bias = None if self.bias is None else self.bias()[None]
        out = self.op(q, k.to(q.dtype), v.to(q.dtype), mask=bias, scale=scale)[..., : self.dim // self.heads]
        return self.out(windows.merge(merge(out)))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        layer = cls(dim, heads, 2)
        for branch in (layer.offset, layer.scale):
            nn.init.normal_(branch.weight, std=0.5)
            nn.init.normal_(branch.bias, std=0.5)
        return layer

    @classmethod
    def example_inputs(cls, batch: int, length: int) -> dict[str, Any]:
        return {"size": (length // 3, 3) if length % 3 == 0 else (1, length)}


def _sampled(x: Float[Tensor, "b n hd"], points: Float[Tensor, "b h r t 2"], size: Size) -> Tensor:
    """Interpolate the heads' channels of a map at their points, with zeros outside: `(B windows, H, T, D)`."""
    batch, heads = points.shape[:2]
    maps = rearrange(to_map(x, size), "b (h d) y x -> (b h) d y x", h=heads).to(points.dtype)
    sides = points.new_tensor(size)
    places = ((2 * points + 1) / sides - 1).flip(-1).flatten(0, 1)  # -1 and 1 are the map's edges, columns first
    found = F.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(found, "(b h) d r t -> (b r) h t d", b=batch)
