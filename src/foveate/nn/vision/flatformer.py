"""Flattened window attention: the cells of a point cloud, sorted window by window, attend in groups of equal size.

FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer (2023), arXiv 2301.08739.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.readable import known
from foveate.nn.parts import released as released_parameters
from foveate.nn.parts.blocks import gelu_mlp
from foveate.nn.parts.flat_windows import FlatGroups, check_coords, flat_groups, flat_window_order
from foveate.nn.parts.grid import Size, sides
from foveate.nn.parts.heads import merge, split
from foveate.ops.dense.softmax import Softmax

#: The axis and the shift of a block's four layers.
ORDERS: tuple[tuple[Literal["x", "y"], bool], ...] = (("x", False), ("x", True), ("y", False), ("y", True))
#: How names of the release's network become ours.
_NAMES = (
    (r"\bblock_list\.", "blocks."), (r"\.block\.(\d+)\.", r".layers.\1."), (r"\.attn\.attn\.out_proj\.", ".out."),
    (r"\.attn\.attn\.in_proj_", ".in_proj."), (r"\.fc1\.", ".mlp.0."), (r"\.fc2\.", ".mlp.2."),
    (r"\.norm1\.", ".norm."), (r"\.norm2\.", ".mlp_norm."),
)  # fmt: skip
_PARTS = ((r"\bin_proj\.", ("q.", "k.", "v.")),)


@final
class FlatFormerBlock(Checked, nn.Module):
    """Four layers `x = LN(x + attention(x));  x = LN(x + MLP(x))` in groups of equal size: `(M, C) -> (M, C)`.

        attention(x) = softmax((x + p) W_q W_kᵀ (x + p)ᵀ / sqrt(D)) x W_v W_o  inside each group, p = sin, cos of places

    The four layers sort the cells along x, along x in shifted windows, along y, and along y in shifted windows. Groups
    hold `group_size` tokens whatever the population of their windows, so that nothing is filled up and M tokens cost
    O(M g C). Clouds of several samples are one list. If all cells of a grid are there and a window has g cells, it is
    window attention; with g at least M, global attention within each sample. The wrong choice for images, where windows
    are full and need no sorting, and for clouds of a few hundred points, which can attend globally.

    Args:
        dim, heads: C and H, a divisor of C.
        window: `(h, w)` in cells, or one number for both. The release's class has 9, its configuration 13.
        group_size: g. The release's class has 69, its configuration 144.
        mlp_ratio: hidden width of the MLPs over C.
        temperature: base of the frequencies of places, which fall from 1 to nearly 1 / temperature.

    Raises:
        OptionError: an option out of range.
    """

    def __init__(
        self, dim: int = 128, heads: int = 8, window: int | Size = 13, group_size: int = 144, *,
        mlp_ratio: float = 2.0, temperature: float = 10_000.0,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("dim", dim, 4)
        validate.count("heads", heads, 1)
        validate.count("group_size", group_size, 1)
        validate.at_least("temperature", temperature, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        self.dim, self.window = dim, sides("window", window)
        self.group_size, self.temperature = group_size, temperature
        self.layers = nn.ModuleList(_Layer(dim, heads, mlp_ratio) for _ in ORDERS)

    def forward(
        self, x: Float[Tensor, "m c"], coords: Int[Tensor, "m 3"], groups: Sequence[FlatGroups] | None = None
    ) -> Float[Tensor, "m c"]:
        """Let cells attend.

        Args:
            x: vectors of the cells that hold points, of all samples; there may be none.
            coords: (sample, row, column) of each cell, whole numbers; samples are counted from 0.
            groups: those of `self.groups(coords)`, where they are at hand.

        Raises:
            ShapeError: a malformed call.
        """
        check_coords(coords)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != (len(coords), self.dim):
            raise ShapeError(f"x must be (M={len(coords)}, C={self.dim}) beside coords (M, 3); got {shown(x)}")
        if not len(x):
            return x
        place = _waves(coords[:, 1:], self.dim, self.temperature).to(x.dtype)
        for layer, each in zip(self._layers(), self.groups(coords) if groups is None else groups, strict=True):
            x = layer(x, place, each)
        return x

    def groups(self, coords: Int[Tensor, "m 3"]) -> list[FlatGroups]:
        """Return the groups of the four layers; blocks with one window and group size can share them."""
        orders = [flat_window_order(coords, self.window, axis, shift) for axis, shift in ORDERS]
        return [flat_groups(coords[:, 0].long(), order, self.group_size) for order in orders]

    def _layers(self) -> Iterator[_Layer]:
        return cast("Iterator[_Layer]", iter(self.layers))


@final
class FlatFormer(Checked, nn.Module):
    """The release's middle encoder: `FlatFormerBlock`s, which share one sorting, `(M, C) -> (M, C)`.

    What makes the cells of a point cloud goes before it, and `pillar_map`, a convolutional backbone and a detector's
    head behind it; they are left out.

    Args:
        dim, heads, window, group_size, mlp_ratio, temperature: see `FlatFormerBlock`.
        blocks: number of blocks, of four layers each.
    """

    def __init__(
        self, dim: int = 128, heads: int = 8, blocks: int = 2, window: int | Size = 13, group_size: int = 144, *,
        mlp_ratio: float = 2.0, temperature: float = 10_000.0,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("blocks", blocks, 1)
        self.blocks = nn.ModuleList(
            FlatFormerBlock(dim, heads, window, group_size, mlp_ratio=mlp_ratio, temperature=temperature)
            for _ in range(blocks)
        )

    def forward(self, x: Float[Tensor, "m c"], coords: Int[Tensor, "m 3"]) -> Float[Tensor, "m c"]:
        """Let cells attend; see `FlatFormerBlock.forward`."""
        groups = cast(FlatFormerBlock, self.blocks[0]).groups(coords)
        for block in self.blocks:
            x = block(x, coords, groups)
        return x

    def load_released(self, released: Mapping[str, Tensor]) -> None:
        """Load the state dict of the release's `FlatFormer` in mit-han-lab/flatformer, with the same options.

        Raises:
            OptionError: parameters that this network lacks, or has alone, or has in another shape.
        """
        released_parameters.load(self, released_parameters.renamed(released, _NAMES, _PARTS))


def pillar_map(
    x: Float[Tensor, "m c"], coords: Int[Tensor, "m 3"], size: Size, batch: int
) -> Float[Tensor, "{batch} c h w"]:
    """Return the cells of a cloud as maps `(batch, C, H, W)`, with zeros where there is no cell.

    Args:
        x: vectors of the cells.
        coords: (sample, row, column) of each cell, in the maps; no two are the same.
        size: `(H, W)`.
        batch: number of samples.

    Raises:
        ShapeError: vectors beside other coordinates, or a cell outside the maps.
    """
    check_coords(coords)
    if x.dim() != 2 or len(x) != len(coords):
        raise ShapeError(f"x must be (M={len(coords)}, C) beside coords (M, 3); got {shown(x)}")
    ends = torch.tensor([batch, *size], device=coords.device)
    if known(((coords >= 0) & (coords < ends)).all()) is False:
        raise ShapeError(f"coords must be (sample, row, column) below ({batch}, {size[0]}, {size[1]}) and at least 0")
    sample, row, column = coords.long().unbind(1)
    return x.new_zeros(batch, *size, x.shape[1]).index_put((sample, row, column), x).movedim(-1, 1)


@final
class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, self.op = heads, Softmax()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm, self.mlp_norm, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), gelu_mlp(dim, mlp_ratio)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.zeros_(linear.bias)
        for linear in (self.q, self.k, self.v):  # the release draws them as one matrix, whose numbers are smaller
            linear.weight.data *= 0.5**0.5

    def forward(self, x: Tensor, place: Tensor, groups: FlatGroups) -> Tensor:
        at = x + place
        q, k, v = (split(y[groups.tokens], self.heads) for y in (self.q(at), self.k(at), self.v(x)))
        read = merge(self.op(q, k, v, mask=None if groups.seen is None else groups.seen[:, None, None]))
        x = self.norm(x + self.out(read.flatten(0, 1)[groups.own]))
        return self.mlp_norm(x + self.mlp(x))


def _waves(cells: Int[Tensor, "m 2"], dim: int, temperature: float) -> Float[Tensor, "m c"]:
    """Return sines and cosines of columns in the first half of the channels, and those of rows in the second half."""
    pairs = dim // 4
    rates = temperature ** (torch.arange(pairs, device=cells.device) / pairs)
    angles = cells.flip(1)[..., None] / rates
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return F.pad(waves, (0, dim - 4 * pairs))
