"""Efficient probing: learned queries read the tokens of a frozen encoder, without key and query projections.

Attention, Please! Revisiting Attentive Probing for Masked Image Modeling (2025), arXiv 2506.10178.
"""

from __future__ import annotations

from typing import Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.nn.base.pool import Pool, Pooled


@final
class EfficientProbe(Pool):
    """M queries attend to the tokens as they are, and each fills its own slice of the pooled vector.

    `A = softmax_N(U xᵀ C^-0.5)` has a map for each query of U `(M, C)`. Slice m of the vector is `A_m (x W_v)_m`, where
    W_v makes `C / d_out` channels that are split in M slices. So a query selects as a head does, but with all C
    channels. O(N M C + C²) time, `M C + C² / d_out` parameters. The maps show where each query looks. The wrong choice
    if tokens have to be compared with each other, or if one token already sums up the rest.

    Args:
        dim: C, the width of tokens, a multiple of `num_queries * d_out`.
        num_queries: M.
        d_out: the factor by which the pooled vector is narrower than a token.

    Tokens are pooled before W_v, which is linear, and not after it as in the release: the result is the same, and W_v
    works on M vectors in place of N. In the release queries are called `cls_token`, and W_v is `v`. The release has an
    option for several heads, which fails for more than one.
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1) -> None:
        for name, value in {"dim": dim, "num_queries": num_queries, "d_out": d_out}.items():
            validate.count(name, value, 1)
        if dim % (num_queries * d_out):
            raise OptionError(f"num_queries * d_out = {num_queries * d_out} must divide dim={dim}")
        super().__init__(dim, out_dim=dim // d_out, maps=num_queries)
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, dim))
        self.v = nn.Linear(dim, dim // d_out, bias=False)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        weights = self._softmax((self.queries * self.dim**-0.5) @ x.mT, mask)
        slices = self.v.weight.unflatten(0, (self.maps, -1))
        vector = torch.einsum("bmc,moc->bmo", weights @ x, slices).flatten(1)
        return Pooled(vector[:, None], weights)

    @classmethod
    def example(cls, dim: int) -> Self:
        made = cls(dim, 4 if dim % 4 == 0 else 1)
        with torch.no_grad():
            made.queries.mul_(100)  # first queries are so small that all maps are nearly flat
        return made


@final
class ProbeHead(Checked, nn.Module):
    """A probe: a pool, a batch norm without parameters, and a linear classifier. The encoder stays frozen.

    All pools are compared under this one head. `ProbeHead(MeanPool(dim), classes)` is linear probing.

    Args:
        pool: any `Pool`; the vectors of one with several slots are concatenated.
        classes: the number of classes.
    """

    def __init__(self, pool: Pool, classes: int) -> None:
        super().__init__()
        if not isinstance(pool, Pool):
            raise OptionError(f"pool={shown(pool)} must be a foveate.nn.Pool")
        validate.count("classes", classes, 1)
        width = pool.slots * pool.out_dim
        self.pool = pool
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "#b #n"] | None = None
    ) -> Float[Tensor, "b classes"]:
        """Return logits for the frozen encoder's tokens; `mask` is True for real tokens, None for all.

        Raises:
            ShapeError: malformed tokens or mask, or a single example in training, which has no variance.
        """
        vectors = self.pool(x, mask).flatten(1)
        if self.training and len(vectors) == 1:
            raise ShapeError("x must have B > 1 in training, for the batch norm; got B=1")
        return self.head(self.norm(vectors))
