"""TriAttention: where a head's queries point before their rotation says how it will see a key at each distance.

TriAttention: Efficient Long Reasoning with Trigonometric KV Compression (2026), arXiv 2604.04921.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.host import Host, Method
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.probing import Progress, read
from foveate.host.site import Site
from foveate.host.slots.ends import AtEnd
from foveate.kv.base.policy import calibration_items
from foveate.kv.base.scored import ScorePolicy, own_positions
from foveate.kv.parts.query_statistics import Future, futures
from foveate.kv.parts.window_queries import per_kv_head
from foveate.kv.renumbered import Rotation, rotations


@final
@dataclass(eq=False)
class TriAttention(ScorePolicy):
    """A token's score is the logit that the head's average query will give its key, over many future distances.

    Before the rotary embedding, the queries of a head lie close to one direction. Their mean `m` and their mean length
    `a` in each pair of rotating channels, measured once on some text, tell how a key `k` is seen at the distance `d`:

        score(k) = sum over pairs of |m| |k| cos(w d + angle of m to k) + (a - |m|) |k|

    The first term is averaged over the distances `d + 1, d + 2, d + 4, ... d + 65536`. The second stands for queries
    whose direction varies. Cost: one product of each key with one query for each query head, at each compression; no
    attention weights. For long generation. The wrong choice for a head whose queries have no common direction.

    Like the release's mode "per layer and head": each head of each layer chooses for itself. Its two other modes, in
    which all heads of the model keep the same tokens, are not here. The release keeps `limit` tokens and compresses
    every 128 steps.

    Args:
        queries: mean query of each head from before the embedding, `(layers, Hq, D)`, by `TriAttention.calibrate`.
        lengths: mean length of each pair of channels of these queries, `(layers, Hq, pairs)`; 0 where there is no such
            head or pair.
        limit: tokens that a head keeps; None for a share of all tokens so far.
        every: compress again after that many new tokens.
        prompt: whether the prompt's tokens always stay, as in the release. They count towards the limit, which has to
            be larger.
        group: how the query heads of a key/value head are combined: "max" or "mean".
        normalize: whether the scores of each query head are shifted and scaled to mean 0 and variance 1 first.
        reach: the largest of the distances, which are powers of two.
        share, sink, recent, heads, safeguard, layers: see `ScorePolicy`.

    Models whose keys do not rotate by fixed angles are refused.
    """

    share: float = 1.0
    sink: int = 0
    limit: int | None = 2048
    every: int | None = 128
    queries: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0), repr=False)
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0), repr=False)
    prompt: bool = True
    group: Literal["max", "mean"] = "max"
    normalize: bool = False
    reach: int = 65536
    _futures: dict[int, Future | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.flag("prompt", self.prompt)
        validate.flag("normalize", self.normalize)
        validate.one_of("group", self.group, ("max", "mean"))
        validate.count("reach", self.reach, 1)
        validate.tensor("queries", self.queries)
        validate.tensor("lengths", self.lengths)

    def bind(self, host: Host) -> None:
        super().bind(host)
        found, heads = layout(host), max(layer.heads for layer in layout(host).layers)
        if self.queries.dim() != 3 or self.queries.shape[:2] != (len(found), heads) or self.lengths.shape[:2] != (
            len(found), heads,
        ):  # fmt: skip
            if not self.queries.numel():
                raise OptionError(
                    "TriAttention needs queries= and lengths= of this model's queries: TriAttention.calibrate"
                )
            raise ShapeError(
                f"queries and lengths must begin with (layers, heads)={(len(found), heads)} for this model; got "
                f"{tuple(self.queries.shape)} and {tuple(self.lengths.shape)}"
            )
        self._futures = futures(host, 2 ** torch.arange(self.reach.bit_length()))
        self._rows = {one.layer: row for row, one in enumerate(found.layers)}

    def keep(self, site: Site) -> Bool[Tensor, "b hkv s"] | AtEnd | None:
        if self.prompt and site.phase == "prefill":
            self.is_due(site)  # counts the steps from the prompt on
            return None
        if self.prompt and self.limit is not None and _prompt(site) >= self.limit:
            raise OptionError(
                f"limit={self.limit} leaves no room beside a prompt of {_prompt(site)} tokens; give more, or "
                f"prompt=False"
            )
        return super().keep(site)

    def stays(self, site: Site) -> Bool[Tensor, "b h s"]:
        stays = super().stays(site)
        if not self.prompt:
            return stays
        return stays | ((own_positions(site)[0] >= 0) & (site.positions < _prompt(site)))

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        row, heads, future = self._rows[site.layer], site.q.shape[1], self._futures[site.layer]
        own, count = own_positions(site)
        mean = self.queries[row, :heads].to(site.k.device)
        u = site.k.float() if future is None else future.keys(site.k, count)
        scores = torch.einsum("bhsd,hgd->bhgs", u, mean.unflatten(0, (u.shape[1], -1)))
        if future is not None:
            spread = (self.lengths[row, :heads].to(u.device) - pairs(mean, future.rotation)).clamp_min(0.0)
            lengths = pairs(site.k.float(), future.rotation)
            scores = scores + torch.einsum("bhsf,hgf->bhgs", lengths, spread.unflatten(0, (u.shape[1], -1)))
        scores = scores.flatten(1, 2)
        if self.normalize:
            counts = own >= 0
            if self.prompt:  # tokens that stay in any case do not count
                counts = counts & (site.positions >= _prompt(site))
            scores = _standardised(scores, counts.repeat_interleave(heads // own.shape[1], 1))
        return per_kv_head(scores, site, self.group)

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Measure mean and mean length of each head's queries on eight texts."""
        probe = _Probe(rotations(host))
        for step, (ids, _) in enumerate(calibration_items(data, 8)):
            read(host, ids, probe)
            if progress is not None:
                progress(step + 1, 8, "directions of the queries")
        found = layout(host)
        heads = max(layer.heads for layer in found.layers)
        width = max(total.shape[1] for total in probe.total.values())
        mean, size = torch.zeros(len(found), heads, width), torch.zeros(len(found), heads, width // 2)
        for row, one in enumerate(found.layers):
            total, length = probe.total[one.layer], probe.length[one.layer]
            mean[row, : total.shape[0], : total.shape[1]] = total / probe.count[one.layer]
            size[row, : length.shape[0], : length.shape[1]] = length / probe.count[one.layer]
        return {"queries": mean, "lengths": size}

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The prompt is compressed too."""
        made = super().at_budget(budget, host, length)
        return replace(made, limit=None, prompt=False, queries=learnt["queries"], lengths=learnt["lengths"])


def _prompt(site: Site) -> int:
    """Return the length of the prompt, in a call that decodes; the first of them comes right after it."""
    return site.seen - site.q.shape[2] if site.prompt is None else site.prompt


def pairs(x: Float[Tensor, "*b d"], rotation: Rotation) -> Float[Tensor, "*b n"]:
    """Return the length of each pair of channels that rotate together."""
    n = rotation.angles.shape[0]
    split = x[..., : 2 * n].unflatten(-1, (n, 2) if rotation.neighbours else (2, n))
    return split.norm(dim=-1 if rotation.neighbours else -2)


def _standardised(scores: Float[Tensor, "b h s"], real: Bool[Tensor, "b h s"]) -> Float[Tensor, "b h s"]:
    count = real.sum(-1, keepdim=True).clamp_min(1)
    mean = scores.masked_fill(~real, 0.0).sum(-1, keepdim=True) / count
    off = (scores - mean).masked_fill(~real, 0.0)
    return off / (off.square().sum(-1, keepdim=True) / count).sqrt().clamp_min(1e-6)


class _Probe(Method):
    """A method that adds up each head's queries, rotated back to position 0, and the lengths of their pairs."""

    def __init__(self, known: dict[int, Rotation | None]) -> None:
        self.known = known
        self.total: dict[int, Tensor] = {}
        self.length: dict[int, Tensor] = {}
        self.count: dict[int, int] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal

    def read(self, site: Site, out: Tensor) -> None:
        q, rotation, found = site.q.float(), self.known.get(site.layer), tokens(site)
        at = site.query_positions.expand(q.shape[0], 1, -1)
        own = at if found is None else found.own(at)
        lengths = q.new_zeros(*q.shape[:3], 0)
        if rotation is not None:
            q = rotation(q, -own.clamp_min(0))
            lengths = pairs(q, rotation)
        real = (own >= 0)[..., None]
        totals = ((q * real).sum((0, 2)).cpu(), (lengths * real).sum((0, 2)).cpu())
        before = self.total.get(site.layer, 0.0), self.length.get(site.layer, 0.0)
        self.total[site.layer], self.length[site.layer] = before[0] + totals[0], before[1] + totals[1]
        self.count[site.layer] = self.count.get(site.layer, 0) + int(real.sum())
