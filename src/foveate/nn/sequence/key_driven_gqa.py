"""Key-driven grouped-query attention: the norm of a key head's keys sets its number of queries.

Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention (2024), arXiv 2408.08454.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self, final

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.parts.heads import HeadScheme, split
from foveate.nn.parts.positions import Position
from foveate.ops.operator import Operator

Rule = Literal["gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa"]
RULES: tuple[Rule, ...] = ("gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa")
BETA = 0.9


@final
class KeyDrivenGQA(HeadScheme):
    """Grouped-query attention that allocates H query heads to key heads by the norms of the keys.

    Query heads are cut, in order, into runs of lengths that add up to H; run g attends with key and value head g, and a
    head with an empty run is idle. Cost: that of grouped-query attention with repeated keys. It continues from a
    trained multi-head network (`mha_to_gqa`). The wrong choice for causal networks: norms are taken over all tokens, so
    that only rule="gqa" defines a causal call.

    Args:
        dim: C.
        heads: H.
        kv_heads: G, a divisor of H.
        rule: "gqa": H / G queries each. "kdgqa": in proportion to the norms, scaled to 0..1, so that the weakest gets
            none. "dgqa_diff": in proportion to the change of the norms since a window ago. "dgqa_ema": to a running
            mean of them. "pgqa": as "gqa", but each head's output loses noise of the same mean and spread.
        window: training steps between two updates of the norms, for "dgqa_diff" and "dgqa_ema".
        stats: the norms to use: "batch", means over the batch (the paper's, where images then depend on each other),
            "sample", each item's own, or "running", the batch's in training and the last allocation afterwards.
        op: an operator or its key.
        position: a position scheme, or None.
        bias: True gives all projections biases.
        generator: draws the noise of "pgqa", which requires it.

    Raises:
        OptionError: an option out of range.

    As in the release, the window divides the sum of cache and norms by `window`; "pgqa" spares the entries where row
    and column of a group's noise agree, and one draw serves the batch. Means of norms replace the release's sums over
    the batch, which give the same shares. Unlike in the release, evaluation does not change the cache, equal norms mean
    equal runs (not 0 / 0), and the repair of rounding uses a fixed seed.
    """

    # the allocation depends on values of tensors
    capabilities = replace(HeadScheme.capabilities, transforms=frozenset({"meta"}))

    cache: Tensor
    allocation: Tensor
    trained: Tensor

    def __init__(
        self, dim: int, heads: int = 12, kv_heads: int = 6, rule: Rule = "kdgqa", window: int = 300,
        stats: Literal["batch", "sample", "running"] = "batch", *, op: str | Operator = "softmax",
        position: Position | None = None, bias: bool = False, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, kv_heads=kv_heads, op=op, position=position, bias=bias)
        validate.one_of("rule", rule, RULES)
        validate.one_of("stats", stats, ("batch", "sample", "running"))
        validate.count("window", window, 1)
        if (rule == "pgqa") != (generator is not None):
            raise OptionError('generator must come with rule="pgqa", and only with it')
        self.rule, self.window, self.stats, self.generator = rule, window, stats, generator
        self.q = nn.Linear(dim, heads * self.head_dim, bias)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.register_buffer("cache", torch.zeros(kv_heads))
        self.register_buffer("allocation", torch.full((kv_heads,), heads // kv_heads))
        self.register_buffer("trained", torch.tensor(0))
        if rule != "gqa":
            can = self.capabilities
            masks = can.masks & (frozenset() if rule == "pgqa" else frozenset({"keys"}))
            self._declare(patterns=can.patterns - {"causal self"}, masks=masks, streaming=None)

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            split(self.q(x), self.heads),
            split(self.k(source), self.kv_heads),
            split(self.v(source), self.kv_heads),
        )
        if self.rule in ("gqa", "pgqa"):
            return q, k, v
        runs = self.allocate(masks.without_hidden(k, mask).detach())
        return q, share_out(k, runs, self.heads), share_out(v, runs, self.heads)

    @torch.no_grad()
    def allocate(self, k: Float[Tensor, "b g m d"]) -> Int[Tensor, "*b g"]:
        """Return the number of queries of each key head: `(G,)`, or `(B, G)` if each item has its own."""
        norms = k.flatten(2).norm(dim=-1).to(self.cache.dtype)
        looks = self.rule == "kdgqa" or int(self.trained) % self.window == 0
        frozen = not looks if self.training else self.stats == "running"
        if frozen and self.stats != "sample":
            self.trained += self.training
            return self.allocation
        runs = allocate_queries(norms if self.stats == "sample" else norms.mean(0), self.heads, self.rule, self.cache)
        if self.training:
            self._learn(norms.mean(0), runs, looks)
        return runs

    def _learn(self, norms: Float[Tensor, " g"], runs: Tensor, looks: bool) -> None:
        """Update the buffers in training."""
        self.trained += 1
        if self.stats != "sample":
            self.allocation.copy_(runs)
        if looks and self.rule != "kdgqa":
            self.cache.copy_((self.cache + norms) / self.window)

    def weigh(self, out: Tensor, x: Tensor, q: Tensor) -> Tensor:
        return out - self._noise(out) if self.rule == "pgqa" else out

    def _noise(self, out: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return uniform noise; each head's `N D` numbers have the mean and the standard deviation of its output."""
        rows = out.flatten(2)
        group = self.heads // self.kv_heads
        shape = self.kv_heads, group, rows.shape[-1]
        assert self.generator is not None  # the constructor refuses "pgqa" without one
        noise = torch.rand(shape, generator=self.generator, device=self.generator.device).to(out)
        noise.diagonal(dim1=1, dim2=2).zero_()
        noise = noise.flatten(0, 1)
        noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
        return (noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)).view_as(out)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, max(1, heads // 2), stats="sample")


def allocate_queries(
    norms: Float[Tensor, "*b g"], heads: int, rule: Rule, cache: Float[Tensor, " g"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*b g"]:  # fmt: skip
    """Return the number of queries of each of G key heads; a row adds up to `heads`, and its numbers may be 0.

    Args:
        norms: the norms of the key heads.
        rule: as for `KeyDrivenGQA`.
        cache: earlier norms for "dgqa_diff" and "dgqa_ema"; None for zeros.
        generator: draws the heads that gain or lose a query after rounding under these two; None for one seeded with 0.
    """
    groups = norms.shape[-1]
    if heads % groups:
        raise ShapeError(f"norms must be of G key heads that divide heads={heads}; got G={groups}")
    validate.one_of("rule", rule, RULES)
    cache = torch.zeros_like(norms) if cache is None else cache
    low, high = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
    claims = {
        "kdgqa": (norms - low) / (high - low),
        "dgqa_diff": (cache - norms).abs(),
        "dgqa_ema": BETA * norms + (1 - BETA) * cache,
    }.get(rule, torch.ones_like(norms))
    shares = claims / claims.sum(-1, keepdim=True)
    runs = (heads * torch.where(shares.isfinite(), shares, 1 / groups)).round().long()
    if runs.is_meta:
        return runs
    random = torch.Generator().manual_seed(0) if generator is None else generator
    for row in runs.view(-1, groups):
        _repair(row, heads, None if rule == "kdgqa" else random)
    return runs


def _repair(runs: Int[Tensor, " g"], heads: int, random: torch.Generator | None) -> None:
    """Take from the largest or give to the smallest until the sum is right, or do so at random heads if given."""
    while (left := heads - int(runs.sum())) != 0:
        if random is not None:
            at = int(torch.randint(len(runs), (), generator=random))
        else:
            at = int(runs.argmin() if left > 0 else runs.argmax())
        if left > 0 or runs[at] > 0:
            runs[at] += 1 if left > 0 else -1


def share_out(
    x: Float[Tensor, "b g m d"], runs: Int[Tensor, "*b g"], heads: int | None = None
) -> Float[Tensor, "b h m d"]:
    """Repeat each key (or value) head by its number of queries: `(3, 1)` gives heads 0, 0, 0, 1."""
    index = torch.arange(int(runs.sum(-1).max()) if heads is None else heads, device=runs.device)
    which = (index[:, None] >= runs.cumsum(-1)[..., None, :]).sum(-1)
    if which.dim() == 1:
        return x[:, which]
    return x.gather(1, which[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def mha_to_gqa(state: Mapping[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Convert a network's parameters from multi-head attention to G key heads, by means of runs of H / G heads.

    It changes every `k` and `v` projection (weight and bias), under any prefix, and copies the rest. Load the result
    with `strict=False`, since a `KeyDrivenGQA` also has buffers.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise OptionError(f"kv_heads={kv_heads} must divide heads={heads}")

    def pooled(name: str, p: Tensor) -> Tensor:
        if name.split(".")[-2:][0] not in ("k", "v"):
            return p
        return reduce(p, "(g r d) ... -> (g d) ...", "mean", g=kv_heads, r=heads // kv_heads)

    return {name: pooled(name, p) for name, p in state.items()}
