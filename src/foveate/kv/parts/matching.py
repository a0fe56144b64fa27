"""Attention matching: weights and values with which some tokens reproduce the attention of all of them.

The attention of a set of tokens is known to queries by two numbers for each: the sum of the exponentials of its logits
(its mass), and its output. Both are matched by least squares over reference queries, one head at a time. The normal
equations are added up over a few queries at a time, in float64, so that no matrix of queries times tokens is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.linear_systems import solve_positive
from foveate.core.masks import NEG_INF
from foveate.host.attention import soft_capped
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.host.slots.slots import Slots

#: The largest number of logits that are held at a time.
TILE = 1 << 21


def spread_rows(site: Site, most: int) -> tuple[Int[Tensor, "b r"], Bool[Tensor, "b r"]]:
    """Return the numbers of up to `most` queries of each sequence, evenly spread over its tokens, and which there are.

    A question that will be removed again counts; drafts, which may be refused, do not.
    """
    batch, device = site.q.shape[0], site.q.device
    n = site.q.shape[2] - (site.tentative if site.drafts and site.q.shape[2] > site.tentative else 0)
    real = site.real_queries if tokens(site) is not None else None
    real = torch.ones(batch, n, dtype=torch.bool, device=device) if real is None else real[:, :n].to(device)
    count = real.sum(-1, keepdim=True)
    number, taken = torch.arange(min(most, n), device=device), count.clamp_max(most)
    place = (2 * number + 1) * count // (2 * taken).clamp_min(1)
    order = real.to(torch.uint8).argsort(dim=-1, stable=True)  # padding first, then tokens
    return order.gather(1, (n - count + place).clamp_max(n - 1)), number < taken


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference queries of one key/value head: `q (B, n, D)`, and which of them there are, `real (B, n)`."""

    q: Float[Tensor, "b n d"]
    real: Bool[Tensor, "b n"]
    scale: float
    softcap: float | None

    def tiles(self, size: int) -> list[slice]:
        """Return the rows of some queries at a time, for `size` tokens."""
        step = max(1, TILE // max(1, self.q.shape[0] * size))
        return [slice(start, start + step) for start in range(0, self.q.shape[1], step)]

    def logits(
        self, k: Float[Tensor, "b s d"], usable: Bool[Tensor, "b s"], tiles: list[slice]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of each tile, `(B, r, S)`; those of tokens that are not `usable` are -inf."""
        keys = torch.where(usable[..., None], k, 0.0).to(self.q.dtype).mT * self.scale
        for rows in tiles:
            logits = soft_capped(self.q[:, rows] @ keys, self.softcap)
            yield rows, logits.masked_fill(~usable[:, None], NEG_INF)


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one key/value head.

    Args:
        k, v: `(B, S, D)` and `(B, S, Dv)`.
        bias: the logs of their weights, `(B, S)`.
        usable: the tokens that later queries will see, `(B, S)`; what the others hold does not matter.
    """

    k: Float[Tensor, "b s d"]
    v: Float[Tensor, "b s dv"]
    bias: Float[Tensor, "b s"]
    usable: Bool[Tensor, "b s"]

    @classmethod
    def of(cls, slots: Slots, head: int, usable: Bool[Tensor, "b h s"]) -> Tokens:
        bias = slots.weighted().weight
        assert bias is not None
        return cls(slots.k[:, head], slots.v[:, head], bias[:, head].log(), usable[:, head])

    def joined(self, other: Tokens) -> Tokens:
        pairs = ((self.k, other.k), (self.v, other.v), (self.bias, other.bias), (self.usable, other.usable))
        return Tokens(*(torch.cat(pair, 1) for pair in pairs))


def received(reference: Reference, held: Tokens, how: str) -> Float[Tensor, "b s"]:
    """Return the attention that each token receives from the reference queries: their "max", "mean" or "rms"."""
    total = held.bias.new_zeros(held.bias.shape, dtype=reference.q.dtype)
    for rows, logits in reference.logits(held.k, held.usable, reference.tiles(held.k.shape[1])):
        weights = (
            (logits + held.bias[:, None].to(logits.dtype)).softmax(-1).masked_fill(~reference.real[:, rows, None], 0.0)
        )
        if how == "max":
            total = torch.maximum(total, weights.amax(1))
        else:
            total = total + (weights if how == "mean" else weights.square()).sum(1)
    if how == "max":
        return total
    mean = total / reference.real.sum(-1, keepdim=True).clamp_min(1)
    return mean if how == "mean" else mean.sqrt()


def matched(
    reference: Reference, kept: Tokens, dropped: Tokens, bound: float, ridge: float, steps: int = 200
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t dv"]]:
    """Return the log-weights and the values of the kept tokens that match the attention of all tokens.

    Args:
        reference: the queries.
        kept, dropped: the tokens.
        bound: the largest log-weight, and the negative of the smallest.
        ridge: how strongly weights and values are held near what they were, as a share of the largest eigenvalue of the
            normal equations.
        steps: of the projected gradient.
    """
    size, whole = kept.k.shape[1], kept.joined(dropped)
    tiles = reference.tiles(whole.k.shape[1])
    mass, target = _Equations(), []
    for rows, exponentials, total in _exponentials(reference, whole, tiles):
        mass.add(exponentials[..., :size] * (-kept.bias[:, None]).exp(), total, reference.real[:, rows])
        out = exponentials @ torch.where(whole.usable[..., None], whole.v, 0.0).to(exponentials.dtype)
        target.append(out / total)
    weights = mass.bounded(kept.bias.double().exp()[..., None], bound, ridge, steps)
    weights = torch.where(kept.usable, weights[..., 0], kept.bias.exp())
    value = _Equations()
    fitted = Tokens(kept.k, kept.v, weights.log(), kept.usable)
    for (rows, exponentials, total), out in zip(_exponentials(reference, fitted, tiles), target, strict=True):
        value.add(exponentials / total, out, reference.real[:, rows])
    before = torch.where(kept.usable[..., None], kept.v, 0.0).double()
    values = torch.where(kept.usable[..., None], value.solved(before, ridge), kept.v)
    return weights.log(), values


def _exponentials(reference: Reference, held: Tokens, tiles: list[slice]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the exponentials of each tile's logits, over the largest of each query, and their sums."""
    for rows, logits in reference.logits(held.k, held.usable, tiles):
        logits = logits + held.bias[:, None].to(logits.dtype)
        top = logits.amax(-1, keepdim=True)
        exponentials = (logits - torch.where(top.isinf(), 0.0, top)).exp()
        yield rows, exponentials, exponentials.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


class _Equations:
    """Normal equations `A x = b` of a least-squares problem, added up over its rows."""

    def __init__(self) -> None:
        self.a, self.b = torch.zeros(()), torch.zeros(())

    def add(self, x: Float[Tensor, "b r t"], y: Float[Tensor, "b r c"], real: Bool[Tensor, "b r"]) -> None:
        x = x.masked_fill(~real[..., None], 0.0).double()
        self.a, self.b = self.a + x.mT @ x, self.b + x.mT @ y.double()

    def solved(self, near: Float[Tensor, "b t c"], ridge: float) -> Float[Tensor, "b t c"]:
        """Return the solution near another one: where the rows say nothing, it is that one."""
        pull = ridge * _largest(self.a) + torch.finfo(torch.float64).tiny
        eye = torch.eye(self.a.shape[-1], dtype=self.a.dtype, device=self.a.device)
        return solve_positive(self.a + pull * eye, self.b + pull * near)

    def bounded(self, near: Float[Tensor, "b t 1"], bound: float, ridge: float, steps: int) -> Float[Tensor, "b t 1"]:
        """Return the solution near another one between `exp(-bound)` and `exp(bound)`."""
        start = self.solved(near, ridge)
        pull = ridge * _largest(self.a)
        eye = torch.eye(self.a.shape[-1], dtype=self.a.dtype, device=self.a.device)
        return projected(self.a + pull * eye, self.b + pull * near, start, bound, steps)


def projected(
    a: Float[Tensor, "b t t"], b: Float[Tensor, "b t 1"], start: Float[Tensor, "b t 1"], bound: float, steps: int
) -> Float[Tensor, "b t 1"]:
    """Minimise `x a x / 2 - b x` between `exp(-bound)` and `exp(bound)` by accelerated projected gradients.

    The momentum begins anew where it points uphill.
    """
    low, high = torch.tensor([-bound, bound], dtype=a.dtype).exp().tolist()
    length = 1.0 / (1.01 * _largest(a)).clamp_min(torch.finfo(a.dtype).tiny)
    x = start.clamp(low, high)
    ahead, t = x, torch.ones_like(x[:, :1])
    for _ in range(steps):
        gradient = a @ ahead - b
        new = (ahead - length * gradient).clamp(low, high)
        uphill = ((ahead - new) * (new - x)).sum(1, keepdim=True) > 0
        t = torch.where(uphill, 1.0, t)
        following = (1 + (1 + 4 * t * t).sqrt()) / 2
        ahead, x, t = new + torch.where(uphill, 0.0, (t - 1) / following) * (new - x), new, following
    return x


def _largest(a: Float[Tensor, "b t t"], steps: int = 24) -> Float[Tensor, "b 1 1"]:
    """Return the largest eigenvalue of matrices without negative numbers, by powers."""
    x = a.new_ones(*a.shape[:-1], 1)
    size = a.new_zeros(a.shape[0], 1, 1)
    for _ in range(steps):
        x = a @ x
        size = x.norm(dim=1, keepdim=True)
        x = x / size.clamp_min(torch.finfo(a.dtype).tiny)
    return size


def pursued(
    reference: Reference, held: Tokens, forced: Bool[Tensor, "b s"], count: int, bound: float
) -> Float[Tensor, "b s"]:
    """Return scores by orthogonal matching pursuit: the sooner a token is chosen, the larger.

    The next token is the one whose exponentials agree most with the mass that those before it leave open. Their weights
    are fitted again after each choice. As in the release, two tokens are chosen at a time after 300, four after 1,500.
    This holds a matrix of reference queries times tokens, of this head alone.

    Args:
        reference, held: the queries and the tokens.
        forced: tokens to choose first.
        count: number of tokens to choose.
        bound: the largest log-weight, and the negative of the smallest.
    """
    tiles = _exponentials(reference, held, reference.tiles(held.k.shape[1]))
    parts = [part.masked_fill(~reference.real[:, rows, None], 0.0) for rows, part, _ in tiles]
    e = torch.cat(parts, 1).double()
    target, open_ = e.sum(-1, keepdim=True), held.usable.clone()
    first = 1e30 * torch.arange(e.shape[-1], 0, -1, device=e.device, dtype=e.dtype)  # forced tokens in their order
    scores = torch.full(held.bias.shape, -torch.inf, device=e.device)
    m, gram, weights = e[..., :0], e.new_zeros(e.shape[0], 0, 0), e.new_zeros(e.shape[0], 0, 1)
    while m.shape[-1] < count:
        done = m.shape[-1]
        gain = (e.mT @ (target - m @ weights))[..., 0]
        gain = torch.where(forced, first, gain).masked_fill(~open_, -torch.inf)
        few = min(1 if done < 300 else 2 if done < 1500 else 4, count - done)
        best = gain.topk(few, dim=-1).indices
        scores.scatter_(1, best, -torch.arange(done, done + few, device=e.device, dtype=scores.dtype).expand_as(best))
        open_.scatter_(1, best, False)
        new = e.gather(2, best[:, None].expand(-1, e.shape[1], -1))
        cross, m = m.mT @ new, torch.cat([m, new], -1)
        gram = torch.cat([torch.cat([gram, cross], 2), torch.cat([cross.mT, new.mT @ new], 2)], 1)
        weights = torch.cat([weights, weights.new_ones(weights.shape[0], few, 1)], 1)
        weights = projected(gram, m.mT @ target, weights, bound, 12)
    return scores.masked_fill(~held.usable, -torch.inf)
