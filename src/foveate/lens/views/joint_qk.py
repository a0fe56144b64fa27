"""A joint picture of a head's queries and keys, in which near means high attention.

AttentionViz: A Global View of Transformer Attention (2023), arXiv 2305.03210. Keys are moved to the queries' mean, and
a factor c is put on the queries and taken from the keys. Neither changes the softmax of their products. Then queries
and keys are projected together.

    found = foveate.lens.joint_qk(q, k, method="tsne")         # q (n, d), k (m, d) of one head, after rotary
    found.q_xy, found.k_xy, found.c, found.measures()

c is searched on the grid {0.2, 0.4, 0.8, 1, 1.25, 2.5, 5} by a weighted correlation of distance and product over close
pairs, as a co-author's description of the study has it; the released viewer holds no normalisation. Pairs are close up
to the "0.5 percentile" of all distances, which is read as the median (`quantile`). That text words
the closed form as c² = median |q| / median |k|. For equal norms of q c and k / c it has to be the inverse, which is
what `scale="norms"` computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.lens.views.joint_scaling import Criterion, check_pair, correlation, key_shift, norm_scale, search_scale
from foveate.lens.views.projections import Method, Metric, projected


@final
@dataclass(frozen=True, eq=False)
class JointEmbedding:
    """Queries and keys of one head, brought together and projected.

    Args:
        q_xy, k_xy: the projected queries and keys.
        c: the factor on the queries, which is taken from the keys.
        shift: the vector added to the keys, before the factor.
        q, k: the queries and keys that were projected; their products have the softmax of the given ones.
        raw_q, raw_k: the given queries and keys.
    """

    q_xy: Float[Tensor, "n dim"]
    k_xy: Float[Tensor, "m dim"]
    c: float
    shift: Float[Tensor, " d"]
    q: Float[Tensor, "n d"]
    k: Float[Tensor, "m d"]
    raw_q: Float[Tensor, "n d"]
    raw_k: Float[Tensor, "m d"]

    def measures(self) -> dict[str, float]:
        """Return measures of the head, each before and after.

        "correlation" is that of distance and product over all pairs: -1 where distance tells attention.
        "centroid_distance" is the distance of the means, over the spread of queries and keys; "norm_ratio" the keys'
        mean norm over the queries'; "separation" the mean silhouette of the two groups, 0 where they are mixed.
        """
        found = {}
        for name, q, k in (("before", self.raw_q, self.raw_k), ("after", self.q, self.k)):
            found[f"correlation_{name}"] = correlation(q, k)
            found[f"centroid_distance_{name}"] = _centroid_distance(q, k)
            found[f"norm_ratio_{name}"] = float(k.norm(dim=-1).mean() / q.norm(dim=-1).mean().clamp_min(1e-12))
            found[f"separation_{name}"] = separation(q, k)
        return found


def joint_qk(
    Q: Float[Tensor, "n d"], K: Float[Tensor, "m d"], method: Method = "pca", dim: int = 2, metric: Metric = "cosine",
    scale: Literal["search", "norms"] | float = "search", shift: bool = True, *, criterion: Criterion = "weighted",
    quantile: float = 0.5,
) -> JointEmbedding:  # fmt: skip
    """Bring a head's queries and keys together, and project them.

    Args:
        Q, K: queries and keys of one head, from one text or many.
        method: "pca", which needs no package, or the study's "tsne" (scikit-learn) and "umap" (umap-learn).
        dim: the dimensions of the picture, 2 or 3.
        metric: the distance that t-SNE and UMAP keep.
        scale: the factor on the queries; "search" tries the study's grid, "norms" makes median norms equal, and 1.0
            leaves them as they are.
        shift: whether keys are moved to the queries' mean.
        criterion, quantile: see `foveate.lens.views.joint_scaling.search_scale`.

    Raises:
        OptionError: an option is invalid, or the projection needs a package that is not installed.
    """
    check_pair(Q, K)
    validate.flag("shift", shift)
    moved = key_shift(Q, K) if shift else torch.zeros_like(K[0])
    k = K + moved
    factor = _factor(Q, k, scale, criterion, quantile)
    q, k = Q * factor, k / factor
    both = projected(torch.cat([q, k]), method, dim, metric)
    return JointEmbedding(both[: len(q)], both[len(q) :], factor, moved, q, k, Q, K)


def separation(q: Float[Tensor, "n d"], k: Float[Tensor, "m d"]) -> float:
    """Return the mean silhouette of queries and keys as two groups: 1 far apart, 0 mixed."""
    check_pair(q, k)
    if len(q) < 2 or len(k) < 2:
        raise OptionError(f"separation needs at least 2 queries and 2 keys; got {len(q)} and {len(k)}")
    found = []
    for own, other in ((q.double(), k.double()), (k.double(), q.double())):
        inside = torch.cdist(own, own).sum(1) / (len(own) - 1)
        outside = torch.cdist(own, other).mean(1)
        found.append((outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12))
    return float(torch.cat(found).mean())


def _factor(q: Tensor, k: Tensor, scale: str | float, criterion: Criterion, quantile: float) -> float:
    if scale == "search":
        return search_scale(q, k, criterion=criterion, quantile=quantile)
    if scale == "norms":
        return norm_scale(q, k)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise OptionError(f'scale={shown(scale)} must be "search", "norms" or a factor above 0')
    return float(scale)


def _centroid_distance(q: Tensor, k: Tensor) -> float:
    apart = (q.mean(0) - k.mean(0)).norm()
    spread = torch.cat([q - q.mean(0), k - k.mean(0)]).square().sum(-1).mean().sqrt()
    return float(apart / spread.clamp_min(1e-12))
