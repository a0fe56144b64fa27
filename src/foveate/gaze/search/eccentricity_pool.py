"""Pooling whose windows grow with the distance from the centre of gaze.

Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases (2021), arXiv 2106.02953.
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown

Kind = Literal["avg", "max"]


@final
class EccentricityPool2d(Checked, nn.Module):
    """Pool a feature map around its centre, the fixation: small windows in the fovea, larger ones farther out.

    Output cells nearer to the centre than the fovea's radius F = round(fovea_deg * deg2px / stride) pool windows of
    `rf_min`. The cells around it form rings of width R = round(ring_deg * deg2px / stride); the one that ends at radius
    e pools windows of `rf_min + round(slope * (stride * e - fovea_deg * deg2px))`. Radii are in output cells. The last
    ring holds the corners too. If F is over half the map, every window is `rf_min`. Windows are those of "same"
    padding, and the average is over the input's own cells.

    With `slope=0`, `kind="avg"` and even sides it is `avg_pool2d(rf_min, stride)` for `rf_min = stride`. Time grows
    with the number of different windows. It has no parameters.

    Args:
        stride: s; sides become ceil(side / s).
        rf_min: the window in the fovea, in input cells.
        slope: how fast windows grow, input cells per input cell of eccentricity.
        deg2px: input cells per degree of visual angle.
        fovea_deg: the fovea's diameter in degrees.
        ring_deg: the step of diameter from one ring to the next, in degrees.
        kind: "avg" (the paper) or "max".

    Raises:
        OptionError: an option that is out of range, or rings of less than half a cell.

    The release pads maps that are not square with zeros and returns a square; here a map keeps its own sides.
    """

    def __init__(
        self, stride: int = 2, rf_min: int = 2, slope: float = 0.07, deg2px: float = 8, fovea_deg: float = 4,
        ring_deg: float = 1, *, kind: Kind = "avg",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("stride", stride, 1)
        validate.count("rf_min", rf_min, 1)
        for name, value in (("slope", slope), ("deg2px", deg2px), ("fovea_deg", fovea_deg), ("ring_deg", ring_deg)):
            validate.at_least(name, value, 0)
        validate.one_of("kind", kind, ("avg", "max"))
        self.stride, self.rf_min, self.slope, self.kind = stride, rf_min, slope, kind
        self.deg2px, self.fovea_deg = deg2px, fovea_deg
        self.fovea, self.ring = round(fovea_deg * deg2px / stride), round(ring_deg * deg2px / stride)
        if self.ring < 1:
            raise OptionError(
                f"deg2px={deg2px} must be over {stride / (2 * max(ring_deg, 1e-9)):.4g}: rings are too thin"
            )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the pooled map, `(B, C, ceil(H / stride), ceil(W / stride))`.

        Raises:
            ShapeError: x is no feature map.
        """
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.numel() or not x.is_floating_point():
            raise ShapeError(f"x must be a floating point map (B, C, H, W); got {shown(x)}")
        windows = self.windows(*(-(-side // self.stride) for side in x.shape[2:])).to(x.device)
        sizes = windows.unique().tolist()
        out = same_pool(x, sizes[0], self.stride, self.kind)
        for size in sizes[1:]:
            out = torch.where(windows == size, same_pool(x, size, self.stride, self.kind), out)
        return out

    def windows(self, rows: int, columns: int) -> Int[Tensor, "h w"]:
        """Return the window of each output cell."""
        limit = max(rows, columns) / 2
        if self.fovea > limit:
            return torch.full((rows, columns), self.rf_min)
        down, across = torch.arange(rows) - rows // 2, torch.arange(columns) - columns // 2
        distance = torch.hypot(down[:, None].double(), across.double())
        last = max(1, math.ceil((limit - self.fovea) / self.ring))
        number = torch.floor((distance - self.fovea) / self.ring).long().clamp(-1, last - 1) + 1
        return torch.tensor([self._window(ring) for ring in range(last + 1)])[number]

    def _window(self, ring: int) -> int:
        """Return the window of a ring; ring 0 is the fovea."""
        end = self.fovea + ring * self.ring
        growth = self.slope * (self.stride * end - self.fovea_deg * self.deg2px) if ring else 0.0
        return max(self.rf_min + round(growth), 1)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, rf_min={self.rf_min}, slope={self.slope}, deg2px={self.deg2px}, kind={self.kind}"


def same_pool(x: Float[Tensor, "b c h w"], window: int, stride: int, kind: Kind = "avg") -> Float[Tensor, "b c h2 w2"]:
    """Pool with "same" padding: ceil(side / stride) cells, as much padding behind as before, or one more.

    Padding has no part in an average or a maximum.
    """
    padding = []
    for side in reversed(x.shape[2:]):
        total = max((-(-side // stride) - 1) * stride + window - side, 0)
        padding += [total // 2, total - total // 2]
    if kind == "max":
        return F.max_pool2d(F.pad(x, padding, value=-torch.inf), window, stride)
    if not any(padding):
        return F.avg_pool2d(x, window, stride)
    real = F.avg_pool2d(F.pad(x.new_ones(1, 1, *x.shape[2:]), padding), window, stride)
    return F.avg_pool2d(F.pad(x, padding), window, stride) / real
