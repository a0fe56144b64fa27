"""Attention Matching: the tokens that stay get weights and values with which they stand for all tokens.

Fast KV Compaction via Attention Matching (2026), arXiv 2602.16284. The authors' code is adamzweiger/compaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host import Host, Slots
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.base.policy import check_budget
from foveate.kv.base.scored import ScorePolicy, own_positions, ranks
from foveate.kv.parts.head_split import check_heads
from foveate.kv.parts.matching import Reference, Tokens, matched, pursued, received, spread_rows


@final
@dataclass(eq=False)
class AttentionMatching(ScorePolicy):
    """Keys are chosen; then weights by non-negative least squares, and values by least squares, match the attention.

    For reference queries `q`, keys `K` and values `V` of a head, and the keys `C` of the tokens that stay:
    `exp(q C) w` comes near `sum exp(q K)`, so that the tokens keep the mass of all of them beside later tokens, and
    `softmax(q C + log w) U` comes near `softmax(q K) V`. `w` and `U` are stored: four bytes more for each token. Cost,
    once after the prompt, for each head, with `n` queries of its group, `S` tokens and `t` that stay: `O(n S D)` for
    their logits, twice, and `O(n t^2 + t^3)` for the fit; nothing while decoding but the bias. The wrong choice for
    prompts that are read in many small pieces, and where values have to stay those of the model.

    Args:
        keys: "attention" takes the tokens that reference queries attend to most; "pursuit" chooses them by orthogonal
            matching pursuit, one after another, with the weights fitted in between: slower, for small shares.
        measure: what counts as most attention: "rms" (the release's setting), "max" or "mean" over the queries.
        reference: "prompt" takes queries of the prompt, evenly spread (the paper's context-prefill); "random" takes
            normal vectors, through the layer's `q_norm` if there is one.
        queries: reference queries of each query head, at most.
        bound: the largest log-weight, and the negative of the smallest (the release's 3; 7 with its pursuit).
        ridge: how strongly weights and values are held near what they were, as a share of the largest eigenvalue.
        table: each head's part of the budget, `(layers, kv_heads)`, on any scale; None for equal parts. No head gets
            more than all tokens.
        refit_values: False leaves the values as they are. (A `bound` of 0 leaves the weights at 1.)
        seed: of random queries.
        share, sink, recent, heads, safeguard, layers: see `ScorePolicy`.

    As in the release, a reference query of the prompt attends to all tokens, also to later ones, and the queries of a
    group's heads are put together. Unlike it, accelerated projected gradients solve the bounded problem to the end; the
    release takes two steps. A small ridge keeps the former values where queries say nothing; the release's plain least
    squares returns the shortest solution there. Queries from a second reading ("repeat", self-study) are left out, as
    are queries that have seen lower layers compacted (on-policy). In a prompt of several pieces, the queries of a piece
    serve for what is stored by then. Layers with a window keep the chosen tokens as they are: what a weight stands for
    would leave the window. `every` is refused, since single queries say too little.
    """

    keys: Literal["attention", "pursuit"] = "attention"
    measure: Literal["rms", "max", "mean"] = "rms"
    reference: Literal["prompt", "random"] = "prompt"
    queries: int = 512
    bound: float = 3.0
    ridge: float = 1e-6
    table: Tensor | None = None
    refit_values: bool = True
    seed: int = 0
    _shares: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("keys", self.keys, ("attention", "pursuit"))
        validate.one_of("measure", self.measure, ("rms", "max", "mean"))
        validate.one_of("reference", self.reference, ("prompt", "random"))
        validate.count("queries", self.queries, 1)
        validate.at_least("bound", self.bound, 0.0)
        validate.at_least("ridge", self.ridge, 1e-12)
        validate.flag("refit_values", self.refit_values)
        validate.count("seed", self.seed)
        if self.every is not None:
            raise OptionError(f"every={self.every}: compaction needs the queries of a prompt; leave it out")
        if self.heads == "adaptive" and (self.keys == "pursuit" or self.table is not None):
            raise OptionError("heads='adaptive' compares scores, which neither keys='pursuit' nor table= leaves")
        if self.table is not None and not (isinstance(self.table, Tensor) and bool((self.table >= 0).all())):
            raise OptionError("table must be a tensor (layers, kv_heads) without negative numbers, or None")

    def bind(self, host: Host) -> None:
        super().bind(host)
        found = layout(host)
        if found.expands:
            raise UnsupportedModel(
                f"{type(host.model).__name__} computes keys and values from its cache at each call, so that a token "
                f"cannot be given another value"
            )
        if self.table is not None:
            check_heads("table", self.table, host)
            shares = shared_out(self.table.double(), found.table, self.share)
            self._shares = {one.layer: row[: one.kv_heads] for one, row in zip(found.layers, shares, strict=True)}

    def is_off(self, site: Site) -> bool:
        return self.table is None and super().is_off(site)

    def best(self, site: Site, scores: Float[Tensor, "b hkv s"]) -> Bool[Tensor, "b hkv s"]:
        if self.table is None:
            return super().best(site, scores)
        return (ranks(scores) < self._sizes(site)[..., None]) & ~scores.isneginf()

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        slots = Slots(site.k, site.v, site.positions, _weights(site))
        usable, forced, sizes = self._usable(site, site.positions), self.stays(site), self._sizes(site)
        made = []
        for head in range(site.k.shape[1]):
            reference, held = self._reference(site, head), Tokens.of(slots, head, usable)
            if self.keys == "attention":
                made.append(received(reference, held, self.measure))
            else:
                count = min(int(sizes[:, head].max()), site.k.shape[2])
                made.append(pursued(reference, held, forced[:, head], count, self.bound))
        return torch.stack(made, 1)

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The weight of each token, 4 bytes, is part of the budget."""
        check_budget(budget, length)
        one = layout(host).layers[0]
        token = (one.width + one.value_width) * host.model.dtype.itemsize
        return super().at_budget(budget if budget == 1 else budget * token / (token + 4), host, length)

    def refit(self, site: Site, kept: Slots, dropped: Slots, heads: Tensor) -> Slots:
        if site.slots is not None and site.slots.window is not None:
            return kept
        usable = [self._usable(site, slots.positions) for slots in (kept, dropped)]
        values, weights = kept.v.clone(), kept.weighted().weight
        assert weights is not None
        for place, head in enumerate(heads.tolist()):
            some, others = (Tokens.of(x, place, seen) for x, seen in zip((kept, dropped), usable, strict=True))
            bias, made = matched(self._reference(site, head), some, others, self.bound, self.ridge)
            weights[:, place] = bias.exp().to(weights.dtype)
            if self.refit_values:
                values[:, place] = made.to(values.dtype)
        return replace(kept, v=values, weight=weights)

    def _sizes(self, site: Site) -> Tensor:
        """Return the number of tokens that each head keeps, `(B, Hkv)`."""
        _, count = own_positions(site)
        if self.table is None:
            return self.size(site)[:, None].expand(-1, site.k.shape[1])
        shares = self._shares[site.layer].to(count.device)
        return (count[:, None] * shares).round().long().clamp_min(1)

    def _usable(self, site: Site, positions: Tensor) -> Bool[Tensor, "b h s"]:
        """Return the slots whose attention counts: tokens, without those that will be removed or leave a window."""
        found = tokens(site)
        own = positions if found is None else found.own(positions)
        usable = (own >= 0) & (positions < site.seen)
        window = None if site.slots is None else site.slots.window
        return usable if window is None else usable & (positions > site.seen - window)

    def _reference(self, site: Site, head: int) -> Reference:
        """Return the reference queries of a key/value head: those of its query heads, put together."""
        rows, real = spread_rows(site, self.queries)
        own = slice(head * site.groups, (head + 1) * site.groups)
        dtype = torch.promote_types(site.q.dtype, torch.float32)
        if self.reference == "prompt":
            index = rows[:, None, :, None].expand(-1, site.groups, -1, site.q.shape[3])
            q = site.q[:, own].detach().gather(2, index).to(dtype)
        else:
            q = self._random(site)[own].to(dtype).expand(site.q.shape[0], -1, -1, -1)
            real = real.new_ones(site.q.shape[0], self.queries)
        return Reference(q.flatten(1, 2), real.repeat(1, site.groups), site.scale, site.softcap)

    def _random(self, site: Site) -> Float[Tensor, "hq n d"]:
        """Draw the queries of a layer."""
        draw = torch.Generator().manual_seed(self.seed + site.layer)
        q = torch.randn(site.q.shape[1], self.queries, site.q.shape[3], generator=draw).to(site.q)
        norm: Any = getattr(site.module, "q_norm", None)
        return q if norm is None else norm(q).detach()


def _weights(site: Site) -> Tensor | None:
    """Return the weights of the layer's slots; None if all are 1."""
    if site.is_whole or not site.slots.store.is_weighted:  # type: ignore[union-attr]
        return None
    return site.slots.store.padded("bias").exp()  # type: ignore[union-attr]


def shared_out(table: Float[Tensor, "l h"], real: Bool[Tensor, "l h"], share: float) -> Float[Tensor, "l h"]:
    """Return each head's share of its tokens: as the table says, at most 1, and `share` on average.

    Args:
        table: each head's part of the budget, on any scale.
        real: the heads that there are.
        share: the average.
    """
    if tuple(table.shape) != tuple(real.shape):
        raise ShapeError(
            f"table must be (layers, kv_heads)={tuple(real.shape)} for this model; got {tuple(table.shape)}"
        )
    parts, low, high = table.masked_fill(~real, 0.0), 0.0, 1.0
    if not bool((parts > 0).any()):
        raise OptionError("table must give some head more than nothing")
    positive = parts[parts > 0]
    high = float(1.0 / positive.min())
    for _ in range(100):  # the factor at which the shares, each cut at 1, have the average asked for
        middle = (low + high) / 2
        if float((parts * middle).clamp_max(1.0)[real].mean()) < share:
            low = middle
        else:
            high = middle
    return (parts * high).clamp_max(1.0)
