"""The Set Transformer: attention for sets, without an order.

Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks (2019), arXiv 1810.00825.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.nn.base.pool import Pool, Pooled
from foveate.nn.parts.linear_maps import Linear
from foveate.ops.dense.softmax import Softmax

Scale = Literal["full", "head"]
Variant = Literal["paper", "release"]


@final
class MAB(nn.Module):
    """Multihead attention block, the building block of the others: x attends to y, O(n m).

    `H = LN(q + heads(q, k, v))`, then `LN(H + relu(H W + b))`, with `q = x W_q`, `k = y W_k`, `v = y W_v`. As in the
    release, the residual is the projected query, and heads are concatenated without another projection.

    Args:
        dim_q, dim_kv: widths of x and y.
        dim: hidden and output width, a multiple of `heads`.
        heads: H.
        ln: False removes the two norms.
        scale: scores are divided by the root of the whole width ("full", as released) or of a head's width ("head").
    """

    def __init__(
        self, dim_q: int, dim_kv: int, dim: int, heads: int, *, ln: bool = False, scale: Scale = "full"
    ) -> None:
        super().__init__()
        for name, value in (("dim_q", dim_q), ("dim_kv", dim_kv), ("dim", dim), ("heads", heads)):
            validate.count(name, value, 1)
        if dim % heads:
            raise OptionError(f"heads={heads} must divide dim={dim}")
        validate.one_of("scale", scale, ("full", "head"))
        self.heads, self.scale = heads, (dim if scale == "full" else dim // heads) ** -0.5
        self.q, self.k, self.v = Linear(dim_q, dim), Linear(dim_kv, dim), Linear(dim_kv, dim)
        self.op = Softmax()
        self.feed = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if ln else nn.Identity()
        self.feed_norm = nn.LayerNorm(dim) if ln else nn.Identity()

    def forward(
        self, x: Float[Tensor, "#b n cq"], y: Float[Tensor, "b m ck"], mask: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attend from x, one per set or one for all, to y; `mask (B, 1, 1, m)` is True for real elements of y."""
        q, k, v = self._project(x, y, mask)
        return self._feed(q, self.op(q, k, v, mask=mask, scale=self.scale))

    def read(
        self, x: Float[Tensor, "#b n cq"], y: Float[Tensor, "b m ck"], mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h n m"]]:
        """Return the output of such a call, and the weights of each head."""
        q, k, v = self._project(x, y, mask)
        weights = self.op.weights(q, k, mask=mask, scale=self.scale)
        return self._feed(q, weights @ v), weights

    def _project(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        q, y = self.q(x).expand(y.shape[0], -1, -1), _present(y, mask)
        return tuple(t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, self.k(y), self.v(y)))

    def _feed(self, q: Float[Tensor, "b h n d"], out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        out = self.norm((q + out).transpose(1, 2).flatten(2))
        return self.feed_norm(out + F.relu(self.feed(out)))


class _SetLayer(Layer):
    """The common part of both encoders: elements see all real elements."""

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset({"keys"}))


@final
class SAB(_SetLayer):
    """Set attention block, `MAB(x, x)`: every element attends to all, O(n²); equivariant to their order.

    Args:
        dim: output width, and input width unless `dim_in` is given.
        heads, ln, scale: see `MAB`.
        dim_in: width of the elements that come in.
    """

    def __init__(
        self, dim: int, heads: int, *, dim_in: int | None = None, ln: bool = False, scale: Scale = "full"
    ) -> None:
        super().__init__(dim if dim_in is None else dim_in, heads)
        self.block = MAB(self.dim, self.dim, dim, heads, ln=ln, scale=scale)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        x = _present(x, mask)
        return self.block(x, x, mask)


@final
class ISAB(_SetLayer):
    """Induced set attention block, `MAB(x, MAB(I, x))`: elements interact through a few learned points, O(n m).

    The m points are a bottleneck: cheap for large sets, and the wrong choice if single elements have to find each
    other. It is equivariant to the order of the elements; if order matters, the elements have to contain positions. For
    a whole model see `SetTransformer`.

    Args:
        dim: output width, and input width unless `dim_in` is given.
        heads, ln, scale: see `MAB`.
        inducing: m, the learned points.
        dim_in: width of the elements that come in.
    """

    capabilities = replace(_SetLayer.capabilities, growth="N")

    def __init__(
        self, dim: int, heads: int, inducing: int = 32, *, dim_in: int | None = None, ln: bool = False,
        scale: Scale = "full",
    ) -> None:  # fmt: skip
        super().__init__(dim if dim_in is None else dim_in, heads)
        self.points = _learned(inducing, dim, "inducing")
        self.gather = MAB(dim, self.dim, dim, heads, ln=ln, scale=scale)
        self.spread = MAB(self.dim, dim, dim, heads, ln=ln, scale=scale)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        x = _present(x, mask)
        gathered = self.gather(self.points, x, mask)
        return self.spread(x, gathered)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 3, ln=True)


@final
class PMA(Pool):
    """Pooling by multihead attention: learned seeds attend to the set, `(B, n, C) -> (B, seeds, C)`, for any order.

    Each head of each seed has a weight map; head h of seed s is map `s * heads + h`.

    Args:
        dim, heads, ln, scale: see `MAB`.
        seeds: the number of seeds and outputs; several outputs usually pass an SAB afterwards.
        variant: "paper" sends elements through `relu(z W + b)` first (one layer, as the release has elsewhere);
            "release" does not.
    """

    def __init__(
        self, dim: int, heads: int, seeds: int = 1, *, ln: bool = False, scale: Scale = "full",
        variant: Variant = "paper",
    ) -> None:  # fmt: skip
        for name, value in (("dim", dim), ("heads", heads), ("seeds", seeds)):
            validate.count(name, value, 1)
        validate.one_of("variant", variant, ("paper", "release"))
        super().__init__(dim, slots=seeds, maps=seeds * heads)
        self.seeds = _learned(seeds, dim, "seeds")
        self.before = Linear(dim, dim) if variant == "paper" else None
        self.block = MAB(dim, dim, dim, heads, ln=ln, scale=scale)

    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        vectors, weights = self.block.read(self.seeds, self._fed(x), _of_keys(mask))
        return Pooled(vectors, weights.transpose(1, 2).flatten(1, 2))

    def _vectors(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.block(self.seeds, self._fed(x), _of_keys(mask))

    def _fed(self, z: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return z if self.before is None else F.relu(self.before(z))

    @classmethod
    def example(cls, dim: int) -> Self:
        made = cls(dim, 2 if dim % 2 == 0 else 1, 3, ln=True)
        with torch.no_grad():
            made.seeds.mul_(10)  # with first seeds all maps are nearly flat
        return made


@final
class SetTransformer(nn.Module):
    """A network from a set to a few outputs: two encoder blocks, pooling, two blocks among the outputs, a linear map.

    The outputs do not depend on the order of the elements, nor on masked ones.

    Args:
        dim_in, dim_out: widths of an element and of an output.
        outputs: k, the number of outputs.
        dim: hidden width.
        heads, ln, scale: see `MAB`.
        inducing: points of the encoder's `ISAB`s; None uses `SAB`s.
        variant: see `PMA`.
    """

    def __init__(
        self, dim_in: int, dim_out: int, outputs: int = 1, *, dim: int = 128, heads: int = 4,
        inducing: int | None = 32, ln: bool = False, scale: Scale = "full", variant: Variant = "paper",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("dim_out", dim_out, 1)
        options: dict[str, Any] = {"ln": ln, "scale": scale}

        def encoder(width: int) -> Layer:
            if inducing is None:
                return SAB(dim, heads, dim_in=width, **options)
            return ISAB(dim, heads, inducing, dim_in=width, **options)

        self.encode = nn.ModuleList([encoder(dim_in), encoder(dim)])
        self.pool = PMA(dim, heads, outputs, variant=variant, **options)
        self.decode = nn.Sequential(SAB(dim, heads, **options), SAB(dim, heads, **options), Linear(dim, dim_out))

    def forward(self, x: Float[Tensor, "b n ci"], mask: Tensor | None = None) -> Float[Tensor, "b k co"]:
        """Return the outputs; `mask` is bool `(B, 1, 1, n)`, True for real elements (`foveate.core.masks.padding`)."""
        for block in self.encode:
            x = block(x, mask=mask)
        real = None if mask is None else masks.keys_of(mask, x.shape[0], x.shape[1])
        return self.decode(self.pool(x, real))


def _learned(count: int, dim: int, name: str) -> nn.Parameter:
    """Make learned points `(1, count, C)` to attend from."""
    validate.count(name, count, 1)
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, count, dim)))


def _present(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero padding elements."""
    if mask is None:
        return x
    validate.key_mask(mask, x.shape[0], x.shape[1], x.device)
    return x.masked_fill(~masks.keys_of(mask, x.shape[0], x.shape[1])[..., None], 0.0)


def _of_keys(mask: Bool[Tensor, "b n"] | None) -> Bool[Tensor, "b 1 1 n"] | None:
    return None if mask is None else mask[:, None, None]
