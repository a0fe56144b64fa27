"""Probes: read a model's own attention logits, and cache the results of probes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import masks
from foveate.core.scoring import dot_product
from foveate.host.attention import soft_capped
from foveate.host.entry import apply
from foveate.host.hf.layout import decoder_inputs
from foveate.host.hf.mask import MaskPlan
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site

Result = TypeVar("Result")

#: `progress(step, steps, note)`.
Progress = Callable[[int, int, str], None]

_CACHED: WeakKeyDictionary[nn.Module, dict[Hashable, object]] = WeakKeyDictionary()


def read(host: Host, ids: Int[Tensor, "b n"], *methods: Method) -> None:
    """Run the decoder on a text under methods, without a cache and without computing its logits."""
    assert host.decoder is not None
    with torch.no_grad(), apply(host.model, *methods, on="decoder"):
        host.decoder(**decoder_inputs(host, ids), use_cache=False)


def logits_of(site: Site, rows: Int[Tensor, " r"], batch: int | None = None) -> Float[Tensor, "b hq r s"]:
    """Compute the attention logits of some queries as the model does: capped, and -inf for keys that they may not see.

    Args:
        site: a call of a decoder that reads its whole text at once.
        rows: numbers of the queries, in order.
        batch: number of one sequence; None is all.
    """
    some = slice(None) if batch is None else slice(batch, batch + 1)
    first, last = int(rows[0]), int(rows[-1])
    keys = last + 1 if site.is_plain_causal else site.k.shape[2]
    groups = site.q[some][:, :, rows].unflatten(1, (site.k.shape[1], -1))
    logits = dot_product(groups, site.k[some][:, :, None, :keys], site.scale).flatten(1, 2).float()
    logits = soft_capped(logits, site.softcap)
    mask = _mask(site, first, last + 1, keys)[..., rows - first, :]
    mask = mask[some] if mask.shape[0] > 1 else mask
    if mask.dtype != torch.bool:
        logits = logits + mask
    return logits.masked_fill(~masks.allowed(mask), masks.NEG_INF)


def _mask(site: Site, start: int, stop: int, keys: int) -> Tensor:
    """Return the mask of the queries `start ... stop` and the first keys: `(B or 1, 1 or Hq, R, keys)`."""
    plan = site.attention_mask
    if isinstance(plan, MaskPlan):
        return plan.rows(slice(start, stop)).to(site.q.device)[..., :keys]
    if plan is not None:
        return plan[:, :, start:stop, :keys]
    query = torch.arange(start, stop, device=site.q.device)[:, None]
    return (torch.arange(keys, device=site.q.device) <= query)[None, None]


def cached(host: Host, key: Hashable, probe: Callable[[], Result]) -> Result:
    """Run a probe on a model, and store its result as long as the model lives and its weights do not change."""
    known = _CACHED.setdefault(host.model, {})
    state = _state(host.model)
    if known.get("state") != state:
        known.clear()
        known["state"] = state
    if key not in known:
        known[key] = probe()
    return cast(Result, known[key])  # each probe has keys of its own


def _state(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return a value that changes with every weight: the address of each, and the number of writes to it."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
