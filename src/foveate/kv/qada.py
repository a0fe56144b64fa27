"""QAdA: each query and head decides, from local keys and two moments of all keys, whether it needs the far context.

Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification (2025), arXiv 2502.09647. There is no
official code. The criterion, and the first 16 tokens as sinks, are the paper's. We chose: the window of 128 tokens; the
moments of the sequence's own keys, where the paper takes those of another text; and one pair of moments for each
key/value head. `most` is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.errors import UnsupportedModel
from foveate.core.scoring import dot_product, safe_softmax
from foveate.host import Host
from foveate.host.attention import soft_capped
from foveate.host.hf.layout import layout
from foveate.host.site import Site
from foveate.kv.base.policy import Policy, check_budget
from foveate.kv.base.scored import ranks
from foveate.kv.parts.head_split import check_reach, far_layers
from foveate.kv.parts.key_moments import add_keys, gaussian_mass
from foveate.kv.parts.last_query import has_everything
from foveate.kv.parts.own_places import Places


@final
@dataclass(eq=False)
class QAdA(Policy):
    """While decoding, a head reads only sinks and a window for queries whose attention is likely to stay there.

    The mass of the local keys is exact. That of the others is the mean of `exp(s)` for Gaussian logits s, with mean and
    variance from two moments of the keys: `log T + q.mu + q.Sigma.q / 2`, with the scale of attention. A head is local
    for a query if the local share of both is over `tau`; else it reads everything. A decision costs `D * D` products
    and the local keys, for any length of text, and makes the host wait for the device once in every layer. Which share
    is read follows from the text and `tau`. Nothing is evicted and prefill is dense; memory grows by `D * D` numbers
    for each head. Needs no calibration. The wrong choice if memory is the limit, if most heads need far tokens, or if
    a single far key matters: it hardly moves the moments, and its head is then taken for local. A soft cap is not part
    of the estimate. Layers with a window of their own read all that they hold.

    Args:
        tau: the local share of attention over which a head is local; 1 is dense, and at 0 every head is local.
        sink: number of first tokens that are always read, and not part of the moments.
        local: number of last tokens that are always read, the query's included.
        dense_layers: first layers that read everything, of those that attend to all tokens.
        most: query heads of a layer that may read everything in a step, those with the smallest local share first;
            None for all.
    """

    tau: float = 0.6
    sink: int = 16
    local: int = 128
    dense_layers: int = 0
    most: int | None = None
    in_place: ClassVar[bool] = True
    _order: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        validate.between("tau", self.tau, 0.0, 1.0)
        for name, least in (("sink", 0), ("local", 1), ("dense_layers", 0)):
            validate.count(name, getattr(self, name), least)
        if self.most is not None:
            validate.count("most", self.most)

    def bind(self, host: Host) -> None:
        far = far_layers(layout(host))
        check_reach("sink, local: qada", self.sink + self.local, host)
        if len(far) <= self.dense_layers:
            raise UnsupportedModel(
                f"dense_layers={self.dense_layers}: {type(host.model).__name__} has {len(far)} layers that attend to "
                f"all tokens, so that qada would change nothing"
            )
        self._order = {layer.layer: order for order, layer in enumerate(far)}

    def at(self, site: Site) -> bool:
        return self.tau < 1 and self._order.get(site.layer, -1) >= self.dense_layers and has_everything(site)

    def attend(self, site: Site) -> Tensor | None:
        notes, places = site.notes(self), Places.of(site)
        add_keys(notes, site, places, self.sink)
        near = self.sink + self.local
        if site.phase != "decode" or site.seen <= near:
            return None
        k, v, real, mask = self._local(site, places)
        q = site.q[:, :, -1].unflatten(1, (k.shape[1], -1))
        logits = soft_capped(dot_product(q, k, site.scale), site.softcap).float()
        if mask is not None and mask.dtype != torch.bool:
            logits = logits + mask
        logits = logits.masked_fill(~real, masks.NEG_INF)
        covariance = notes["spread"] / notes["count"].clamp_min(1)
        beyond = (places.count - near)[:, None, None]
        far = gaussian_mass(q, notes["mean"], covariance, beyond, site.scale)
        is_far = self.is_far((logits.logsumexp(-1) - far).flatten(1, 2))
        out = (safe_softmax(logits).to(v.dtype) @ v).flatten(1, 2)[:, :, None]
        counts = places.count[:, None].to(is_far.device)
        table = torch.cat([counts, is_far], 1).tolist()  # the host waits for the device here, once
        site.read_share = fmean(_read(near / max(count, near), heads) for count, *heads in table)
        return self._with_far(site, out, [heads for _, *heads in table])

    def is_far(self, margin: Float[Tensor, "b hq"]) -> Bool[Tensor, "b hq"]:
        """Return the heads that read everything, given the log of the local mass over the estimated far mass."""
        far = margin <= (math.log(self.tau / (1 - self.tau)) if self.tau else -math.inf)
        if self.most is None or self.most >= margin.shape[1]:
            return far
        return far & (ranks(-margin) < self.most)

    def _local(self, site: Site, places: Places) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return local keys and values, which of them there are (and are seen), and the mask's numbers for them."""
        device, count = site.q.device, places.count[:, None]
        sinks = torch.arange(self.sink, device=device).expand(count.shape[0], -1)
        recent = count - self.local + torch.arange(self.local, device=device)
        own = torch.cat([sinks, recent], 1)
        real = torch.cat([sinks < (count - self.local).clamp_min(0), recent >= 0], 1)
        index = places.at(own)
        k, v = (x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (site.k, site.v))
        seen, given = real[:, None, None], None
        mask = None if site.is_plain_causal else site.mask
        if mask is not None:
            rows = mask[:, :, -1].expand(index.shape[0], site.q.shape[1], -1)
            given = rows.gather(2, index[:, None].expand(-1, rows.shape[1], -1)).unflatten(1, (k.shape[1], -1))
            seen = seen & masks.allowed(given)
        return k, v, seen, given

    def _with_far(self, site: Site, out: Tensor, far: list[list[int]]) -> Float[Tensor, "b hq 1 dv"]:
        """Replace the output of the heads that read everything, one key/value head at a time; nothing is copied."""
        groups = site.q.shape[1] // site.k.shape[1]
        mask = site.key_mask if site.is_plain_causal else site.mask
        for row, heads in enumerate(far):
            for head in range(site.k.shape[1]):
                some = [h for h in range(head * groups, (head + 1) * groups) if heads[h]]
                if not some:
                    continue
                logits = soft_capped(site.q[row, some, -1] * site.scale @ site.k[row, head].T, site.softcap).float()
                if mask is not None:
                    given = mask[row if mask.shape[0] > 1 else 0, :, -1]
                    given = given[some] if given.shape[0] > 1 else given
                    logits = logits if given.dtype == torch.bool else logits + given
                    logits = logits.masked_fill(~masks.allowed(given), masks.NEG_INF)
                out[row, some, 0] = safe_softmax(logits).to(out.dtype) @ site.v[row, head]
        return out

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. Sinks and window are an eighth of the prompt at first; the rest pays for far heads.

        `most` is what the budget allows in each layer, and the window takes what is left. The share that is read is
        smaller if `tau` calls fewer heads far.
        """
        check_budget(budget, length)
        if budget == 1:
            return cls(tau=1.0)
        heads = min(layer.heads for layer in far_layers(layout(host)))
        most = int(max(0.0, (budget - 1 / 8) / (7 / 8)) * heads + 1e-6)
        near = cls.tokens(max(0.0, budget - most / heads) / (1 - most / heads), length)
        sink = min(16, near // 8)
        return cls(sink=sink, local=near - sink, most=most)


def _read(near: float, far: list[int]) -> float:
    """Return the share of its keys that a sequence reads: all of them in the heads that are `far`, else `near`."""
    share = sum(far) / len(far)
    return share + (1 - share) * near
