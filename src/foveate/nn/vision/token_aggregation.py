"""Content-aware token aggregation: tokens that resemble the same learned centre attend to each other.

CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025), arXiv 2503.06896.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.nn.base.layer import Layer
from foveate.nn.parts.heads import merge, split
from foveate.nn.parts.overlap import head_widths
from foveate.ops.dense.softmax import Softmax


class Groups(NamedTuple):
    """Places, in the tokens' order by centre, of the queries and the keys of each group.

    Attributes:
        queries: `(groups, g)`.
        keys: `(groups, 2g)`: those of the group, and those of the next one.
        real: keys that are no copies behind the end.
    """

    queries: Int[Tensor, "groups g"]
    keys: Int[Tensor, "groups keys"]
    real: Bool[Tensor, "groups keys"]


def groups(n: int, group: int, device: torch.device | str | None = None) -> Groups:
    """Cut n places into groups of `min(group, n)`; places behind the end mirror those before it."""
    size = min(group, n)
    first = torch.arange(-(-n // max(1, size)), device=device)[:, None] * size
    keys = first + torch.arange(2 * size, device=device)
    return Groups(mirrored(keys[:, :size], n), mirrored(keys, n), keys < n)


def mirrored(places: Int[Tensor, "*s"], n: int) -> Int[Tensor, "*s"]:
    """Return places in `0 .. n - 1`: `n` is again `n - 1`, `n + 1` is `n - 2`, and so on, back and forth."""
    places = places % (2 * n)
    return torch.where(places < n, places, 2 * n - 1 - places)


def spherical_round(x: Float[Tensor, "n c"], centres: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    """Move each centre to the normalised sum of the tokens that are nearest to it by their dot product.

    Args:
        x, centres: vectors of length 1.

    A centre without tokens stays where it is.
    """
    nearest = _nearest(x, centres)
    sums = torch.zeros_like(centres).index_add(0, nearest, x)
    empty = torch.zeros_like(centres[:, 0]).index_add(0, nearest, torch.ones_like(x[:, 0])) == 0
    return torch.where(empty[:, None], centres, F.normalize(sums, dim=-1))


@final
class TokenAggregation(Layer):
    """Attention in groups of g tokens that resemble the same centre, and to the centres: O(N (2g + M) C).

        order = argsort_n(argmax_m cos(x_n, centre_m)),  cut into groups of g tokens
        out_n = softmax(q_n k(own and next group)ᵀ / sqrt(D)) v + softmax(q_n k(centres)ᵀ / sqrt(D)) v(centres)

    Tokens that look alike see each other however far apart they are, at a cost that grows with N. The M centres belong
    to the layer, not to an image: training moves them by spherical k-means over all tokens of a batch, evaluation uses
    them as they are, so that no clustering is left to do. Groups have equal sizes and ignore where one centre's tokens
    end. The wrong choice for text, since groups see the future, and where positions matter more than content.

    Args:
        dim, heads: C and H, a divisor of C.
        centres: M.
        group: g; with N or more this is global attention.
        qk_dim: width of queries and keys of all heads together, a multiple of H; None for C.
        rounds: rounds of k-means at each step of training. Gradients flow through the last one.
        ema: the centres' share that stays at each step; the first step replaces them. With 0.999 they need thousands of
            steps to follow what the network learns.
        across: False leaves the attention to centres out.
        padding: the last groups are filled up with copies of the last tokens, in reverse order. "mirrored" attends to
            these copies, as the release does; "hidden" masks them.

    Raises:
        OptionError: an option out of range.

    Differences from the release: in evaluation before any training it takes chunks of the input as centres, here
    the random ones of the buffer serve, so that images of a batch stay independent. At the first step it fills up
    chunks of tokens with M copies more than needed where M divides N. Tokens of one centre keep their order here; the
    release leaves it to the sort.
    """

    capabilities = replace(Layer.capabilities, patterns=frozenset({"self"}), masks=frozenset(), growth="N")
    centres: Float[Tensor, "m c"]
    started: Int[Tensor, ""]

    def __init__(
        self, dim: int, heads: int, centres: int = 8, group: int = 128, *, qk_dim: int | None = None, rounds: int = 3,
        ema: float = 0.999, across: bool = True, padding: Literal["mirrored", "hidden"] = "mirrored",
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        for name, value in (("centres", centres), ("group", group), ("rounds", rounds)):
            validate.count(name, value, 1)
        validate.between("ema", ema, 0, 1)
        validate.one_of("padding", padding, ("mirrored", "hidden"))
        self.group, self.rounds, self.ema, self.padding = group, rounds, ema, padding
        width = heads * head_widths(dim, heads, qk_dim)[0]
        self.q, self.k, self.v = (nn.Linear(dim, each, bias=False) for each in (width, width, dim))
        self.centre_k = nn.Linear(dim, width, bias=False) if across else None
        self.centre_v = nn.Linear(dim, dim, bias=False) if across else None
        self.out, self.mix = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.register_buffer("centres", torch.randn(centres, dim))
        self.register_buffer("started", torch.tensor(0))
        self.op = Softmax()

    def nearest(self, x: Float[Tensor, "b n c"]) -> Int[Tensor, "b n"]:
        """Return the number of the centre, as evaluation uses them, that each token belongs to."""
        self._check_tokens(x, None)
        return _nearest(F.normalize(x, dim=-1), F.normalize(self.centres, dim=-1))

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        centres = self._moved(x) if self.training else self.centres
        with torch.no_grad():
            order = _nearest(F.normalize(x, dim=-1), F.normalize(centres, dim=-1)).argsort(dim=-1, stable=True)
        q = split(self.q(x), self.heads)
        out = self._within(q, split(self.k(x), self.heads), split(self.v(x), self.heads), order)
        if self.centre_k is not None and self.centre_v is not None:
            k, v = (split(each(centres)[None], self.heads) for each in (self.centre_k, self.centre_v))
            out = out + self.op(q, k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1))
        return self.mix(self.out(merge(out)))

    def _within(self, q: Tensor, k: Tensor, v: Tensor, order: Int[Tensor, "b n"]) -> Float[Tensor, "b h n d"]:
        """Attend group by group, and bring the tokens back into their places."""
        batch, n = order.shape
        cut = groups(n, self.group, order.device)
        queries = _grouped(q, order[:, cut.queries])
        keys, values = (_grouped(each, order[:, cut.keys]) for each in (k, v))
        seen = cut.real.repeat(batch, 1)[:, None, None] if self.padding == "hidden" else None
        out = self.op(queries, keys, values, mask=seen)
        out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]
        return torch.take_along_dim(out, order.argsort(-1)[:, None, :, None], 2)

    def _moved(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "m c"]:
        """Return the centres after this batch's rounds, with a graph, and move those of the buffer towards them."""
        unit, started = F.normalize(x, dim=-1).flatten(0, 1), self.started > 0
        with torch.no_grad():
            found = torch.where(started, self.centres, _chunk_means(x, len(self.centres)))
            for _ in range(self.rounds - 1):
                found = spherical_round(unit, F.normalize(found, dim=-1))
        found = spherical_round(unit, F.normalize(found, dim=-1))
        with torch.no_grad():
            self.centres.copy_(torch.where(started, self.ema * self.centres + (1 - self.ema) * found, found))
            self.started.fill_(1)
        return found

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, 3, 4, qk_dim=3 * heads)


def _nearest(x: Float[Tensor, "*b c"], centres: Float[Tensor, "m c"]) -> Int[Tensor, "*b"]:
    """Return the number of the centre with the largest dot product, compared in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ centres.to(wide).mT).argmax(-1)


def _grouped(x: Float[Tensor, "b h n d"], places: Int[Tensor, "b groups g"]) -> Float[Tensor, "bg h g d"]:
    """Return the tokens at the places of each group; the groups of one image are neighbours in the batch."""
    taken = torch.take_along_dim(x, places.flatten(1)[:, None, :, None], 2)
    return taken.unflatten(2, places.shape[1:]).transpose(1, 2).flatten(0, 1)


def _chunk_means(x: Float[Tensor, "b n c"], count: int) -> Float[Tensor, "m c"]:
    """Return the means, over a batch, of `count` equal chunks of neighbouring tokens, with copies behind the end."""
    n = x.shape[1]
    places = mirrored(torch.arange(-(-n // count) * count, device=x.device), n)
    return x[:, places].unflatten(1, (count, -1)).mean((0, 2))
