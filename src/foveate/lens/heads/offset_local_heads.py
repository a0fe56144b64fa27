"""A report on the attention of a ViT, with the heads that look one patch aside at every place.

Teaching Matters: Investigating the Role of Supervision in Vision Transformers (2022), arXiv 2212.03862. ViTs trained in
six ways are compared by how far heads look, how much their maps depend on the query's place, and their mean map around
the query. All have some *offset local heads*, whose mean map peaks at a neighbour of the query; models that learn to
reconstruct images stay the most local.

    report = VitAttentionReport(attention_maps(vit, images))
    report.attention_distance().mean(0)                        # (layers, heads)
    [peak for peak in report.peaks() if peak.is_offset_local]

Three things differ from the authors' release or are reconstructed. `cls_attention` reads the CLS token's column; the
release reads the next one, which is the first patch. The criterion of `HeadPeak` is ours: the paper finds these heads
by eye. `agreement` keeps the patches that hold a share of the mass, as DINO does. Of the paper's comparison of
features, linear CKA is here; its k-NN, retrieval and keypoint tasks are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import ShapeError, shown
from foveate.lens.parts.patch_maps import checked_grid, patch_attention, patch_places


@final
@dataclass(frozen=True, eq=False)
class HeadPeak:
    """The peak of a head's aligned attention, and whether it is the mark of a local head.

    Args:
        layer, head: the head.
        offset: rows and columns from the query to the peak; (0, 1) is the patch to its right.
        strength: the aligned attention at the peak.
        rival: the largest aligned attention outside the query and its eight neighbours.
        tau: least strength of a local head.
    """

    layer: int
    head: int
    offset: tuple[int, int]
    strength: float
    rival: float
    tau: float

    @property
    def is_local(self) -> bool:
        """Return whether the peak is at the query or beside it, is strong, and at least twice what is further away."""
        near = max(abs(step) for step in self.offset) <= 1
        return near and self.strength >= self.tau and self.strength >= 2 * self.rival

    @property
    def is_offset_local(self) -> bool:
        """Return whether the head is local and looks beside the query, not at it."""
        return self.is_local and self.offset != (0, 0)


@final
@dataclass(frozen=True, eq=False)
class VitAttentionReport:
    """Measures of a ViT's attention maps.

    Args:
        attn: weights of all layers and heads, rows summing to 1; see `attention_maps`.
        grid: rows and columns of patches; None for a square.
        prefix: tokens before the patches: CLS, and registers where there are any.
    """

    attn: Float[Tensor, "b l h n n"]
    grid: tuple[int, int] | None = None
    prefix: int = 1

    def __post_init__(self) -> None:
        validate.count("prefix", self.prefix)
        object.__setattr__(self, "grid", checked_grid(self.attn, self.grid, self.prefix))

    @property
    def _sides(self) -> tuple[int, int]:
        assert self.grid is not None  # set when the report is made
        return self.grid

    def attention_distance(self) -> Float[Tensor, "b l h"]:
        """Return how far heads look: the mean distance from a patch to what it attends to, among patches.

        The image is the unit square: the distance from side to side is 1. Weights on other tokens are taken out and
        rows divided by what is left; a row with nothing left counts as 0.
        """
        places = patch_places(self._sides) / (torch.tensor(self._sides) - 1).clamp_min(1)
        distances = torch.cdist(places, places).to(self.attn)
        return (self._patches() * distances).sum(-1).mean(-1)

    def position_deviation(self) -> Float[Tensor, "b l h"]:
        """Return how much a head's map depends on the query: the deviation over queries, averaged over patches as keys.

        It is 0 if all queries attend alike. As in the release: the unbiased standard deviation, rows not divided by
        their sum among patches.
        """
        return self.attn[..., self.prefix :, self.prefix :].std(-2).mean(-1)

    def cls_attention(self) -> Float[Tensor, "b l h"]:
        """Return the mean weight that patches put on the first token, CLS."""
        if not self.prefix:
            raise ShapeError("prefix=0: cls_attention needs a CLS token before the patches")
        return self.attn[..., self.prefix :, 0].mean(-1)

    def attention_on_tokens(
        self, queries: Literal["all", "cls", "patches", "patches only"] = "all"
    ) -> Float[Tensor, "l h n"]:
        """Return the mean weight on each token, over images and queries.

        Args:
            queries: "all" tokens, "cls", "patches", or "patches only": patches, without the weights on other tokens.
        """
        validate.one_of("queries", queries, ("all", "cls", "patches", "patches only"))
        if queries == "cls" and not self.prefix:
            raise ShapeError('prefix=0: queries="cls" needs a CLS token before the patches')
        if queries == "patches only":
            found = torch.zeros_like(self.attn[:, :, :, 0])
            found[..., self.prefix :] = self._patches().mean(-2)
            return found.mean(0)
        rows = {"all": slice(None), "cls": slice(1), "patches": slice(self.prefix, None)}[queries]
        return self.attn[..., rows, :].mean((0, 3))

    def aligned(self, normalize: Literal["count", "overlap"] = "count") -> Float[Tensor, "l h y x"]:
        """Return each head's mean map around the query, `(layers, heads, 2 rows - 1, 2 columns - 1)`.

        The query is in the middle. Rows are those of `attention_distance`.

        Args:
            normalize: "count" divides by the number of queries, as the release, so that a map sums to 1; "overlap"
                divides by the number of queries that have a patch at the offset, so that the border weighs no less.
        """
        validate.one_of("normalize", normalize, ("count", "overlap"))
        rows, columns = self._sides
        places = patch_places(self._sides).long().to(self.attn.device)
        offsets = places[None] - places[:, None] + torch.tensor([rows - 1, columns - 1]).to(places)  # query, key
        cells = (offsets[..., 0] * (2 * columns - 1) + offsets[..., 1]).flatten()
        mean = self._patches().mean(0).flatten(2)
        sums = mean.new_zeros(*mean.shape[:2], (2 * rows - 1) * (2 * columns - 1)).index_add_(2, cells, mean)
        queries = torch.full_like(sums[0, 0], len(places)) if normalize == "count" else cells.bincount().to(sums)
        return (sums / queries).unflatten(2, (2 * rows - 1, 2 * columns - 1))

    def peaks(self, tau: float = 0.25) -> list[HeadPeak]:
        """Return the peak of each head's aligned attention, layer by layer.

        Args:
            tau: least aligned attention at the peak of a local head.
        """
        validate.between("tau", tau, 0.0, 1.0)
        rows, columns = self._sides
        maps, found = self.aligned(), list[HeadPeak]()
        far = torch.ones_like(maps[0, 0], dtype=torch.bool)
        far[max(rows - 2, 0) : rows + 1, max(columns - 2, 0) : columns + 1] = False
        for layer, of_layer in enumerate(maps):
            for head, picture in enumerate(of_layer):
                y, x = divmod(int(picture.argmax()), 2 * columns - 1)
                rival = float(picture[far].max()) if bool(far.any()) else 0.0
                offset = (y - rows + 1, x - columns + 1)
                found.append(HeadPeak(layer, head, offset, float(picture[y, x]), rival, tau))
        return found

    def agreement(
        self, masks: Bool[Tensor, "b y x"], keep: float = 0.6, queries: Literal["cls", "patches"] = "cls"
    ) -> Float[Tensor, "b l h"]:
        """Return how well a head's map shows an object: the overlap (IoU) of its strongest patches with a mask.

        Args:
            masks: the patches of each image that belong to the object, `(B, rows, columns)`.
            keep: the strongest patches that together hold this share of the mass are compared.
            queries: the map of the CLS token, or the mean over patches.
        """
        validate.between("keep", keep, 0.0, 1.0)
        validate.one_of("queries", queries, ("cls", "patches"))
        if tuple(masks.shape) != (len(self.attn), *self._sides) or masks.dtype != torch.bool:
            raise ShapeError(f"masks must be bool (B, rows, columns)={(len(self.attn), *self._sides)}; "
                             f"got {shown(masks)}")  # fmt: skip
        rows = slice(self.prefix, None) if queries == "patches" else slice(1)
        mass = self.attn[..., rows, self.prefix :].mean(-2)
        share, order = (mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)).sort(-1, descending=True)
        strongest = torch.zeros_like(mass, dtype=torch.bool)
        strongest.scatter_(-1, order, share.cumsum(-1) - share < keep)
        wanted = masks.flatten(1)[:, None, None].to(strongest.device)
        return (strongest & wanted).sum(-1) / (strongest | wanted).sum(-1).clamp_min(1)

    def _patches(self) -> Float[Tensor, "b l h p p"]:
        return patch_attention(self.attn, self.prefix)


def linear_cka(x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> float:
    """Return the similarity of two sets of features of the same examples: linear centred kernel alignment, in 0..1.

    It does not change under rotations and a common factor of the features. NaN if a set's features are all equal.

    Args:
        x, y: features, one row for each example; far fewer examples than features make unrelated sets similar.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not len(x):
        raise ShapeError(f"x and y must be (n, d) with as many rows; got {shown(x)} and {shown(y)}")
    x, y = (each.double() - each.double().mean(0) for each in (x, y))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
