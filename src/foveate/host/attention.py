"""Compute one attention call of a model under methods, on the cheapest path that their hooks allow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import engines, masks
from foveate.core.call import AttentionCall
from foveate.core.engines import fused, gather, reference
from foveate.core.errors import UnsupportedModel
from foveate.core.readable import trusted
from foveate.core.scoring import dot_product, safe_softmax
from foveate.core.selection import Blocks, Indices, Selection
from foveate.host import coded_attention
from foveate.host.hf.kept_mask import KeptMask
from foveate.host.hf.mask import MaskPlan
from foveate.host.method import Method, overrides
from foveate.host.site import Site
from foveate.host.slots.group import Group
from foveate.host.slots.store import Store

Native = Callable[[Site], tuple[Tensor, Tensor | None]]


def run(site: Site, methods: list[Method], native: Native) -> tuple[Tensor, float]:
    """Return the per-head output `(B, Hq, Nq, Dv)` after all hooks, and the share of keys that was read."""
    active = [method for method in methods if method.at(site)]
    out, density = _attend(site, active, native)
    for method in active:
        out = method.edit_output(site, out)
    for method in active:
        method.read(site, out)
    return out, density


def _attend(site: Site, methods: list[Method], native: Native) -> tuple[Tensor, float]:
    for method in reversed(methods):  # the method that was applied last decides
        out = method.attend(site) if overrides(method, "attend") else None
        if out is not None:
            if site.is_biased:
                raise UnsupportedModel(
                    f"{type(method).__name__} replaces attention, and would ignore the learnt sinks or the position "
                    f"bias of {type(site.module).__name__}"
                )
            site.replaced = True
            return out, site.read_share
    chosen = [s for m in methods if overrides(m, "select") and (s := m.select(site)) is not None]
    site.selections = selections = [s.for_heads(site.q.shape[1]) for s in chosen]
    edits = any(overrides(m, "edit_logits") or overrides(m, "edit_weights") for m in methods)
    if edits or (site.wants_weights and (selections or not site.is_whole)):
        return _whole_matrix(site, methods, selections), 1.0
    if selections:
        return selected(site, selections)
    if site.hidden_keys is not None:
        return _softmax(site, [], None), 1.0
    if site.is_whole:
        if _packs(site, methods):
            return engines.run(AttentionCall(site.q, site.k, site.v, site.scale, site.mask), "fused"), 1.0
        out, site.weights = native(site)
        return out.transpose(1, 2), 1.0
    return _slots(site), 1.0


def _packs(site: Site, methods: list[Method]) -> bool:
    """Return whether a method asks for the packed kernel and the kernel can compute this call."""
    if site.wants_weights:
        return False
    few = site.q.shape[2] <= fused.FEW and not site.dropout and site.softcap is None and not site.is_biased
    return few and site.groups > 1 and any(method.packs for method in methods)


def selected(site: Site, selections: list[Selection]) -> tuple[Tensor, float]:
    """Return attention to chosen keys and the share of keys that was read.

    A single selection is gathered. Several selections, a soft cap, sinks, a bias or dropout take masks.
    """
    if not selections:
        return _softmax(site, [], None), 1.0
    (first, *others) = selections
    density = min(1.0, first.keys_read() / max(site.k.shape[2], 1))
    if site.softcap is not None or site.is_biased or site.dropout or others or not isinstance(first, Blocks | Indices):
        allowed = first.dense()
        for other in others:
            allowed = allowed & other.dense()
        return _softmax(site, [], allowed), density
    causal = site.is_plain_causal  # in that case no mask matrix is made
    mask = site.key_mask if causal else site.mask
    call = AttentionCall(site.q, site.k, site.v, site.scale, mask, causal and site.is_causal, selected=first)
    if isinstance(first, Indices) and _sees_all_gathered(call, first):
        with trusted():
            return gather.attend(call), density
    return engines.run(call), density


def _sees_all_gathered(call: AttentionCall, chosen: Indices) -> bool:
    """Return whether a query sees every key that is gathered for it, or might see it.

    No hidden NaN can then reach the output. So the engine's check for NaN, which waits for the device, is not needed.
    """
    one = call.n_queries == 1 and (chosen.valid is None or chosen.counted is not None) and call.mask is None
    return one and not call.is_empty and chosen.indices.shape[-1] > 0


def _whole_matrix(site: Site, methods: list[Method], selections: list[Selection]) -> Tensor:
    allowed = None
    for selection in selections:
        allowed = selection.dense() if allowed is None else allowed & selection.dense()
    return _softmax(site, methods, allowed)


def softmax_over(site: Site) -> Tensor:
    """Compute attention to all keys of a call, soft cap included, from its whole matrix."""
    return _softmax(site, [], None)


def _softmax(site: Site, methods: list[Method], allowed: Tensor | None) -> Tensor:
    """Compute attention from its whole matrix, so that methods can edit it."""
    call = AttentionCall(site.q, site.k, site.v, site.scale)
    logits = dot_product(site.q, call.grouped(site.k), site.scale)
    logits = soft_capped(logits, site.softcap)
    for method in methods:
        logits = method.edit_logits(site, logits)
    mask = masks.combine(site.mask, allowed)
    if mask is not None:
        logits = logits + mask if mask.dtype != torch.bool else logits
        logits = logits.masked_fill(~masks.allowed(mask), masks.NEG_INF)
    weights = softmax(site, logits.to(torch.promote_types(logits.dtype, torch.float32))).to(site.q.dtype)
    for method in methods:
        weights = method.edit_weights(site, weights)
    site.weights = weights
    return reference.apply_weights(F.dropout(weights, site.dropout), call.grouped(site.v))


def _slots(site: Site) -> Tensor:
    """Compute the attention of a layer from which tokens were evicted."""
    assert site.slots is not None and site.slots.store is not None
    store = site.slots.store
    if store.codes is not None:
        return _coded(site, store)
    if site.softcap is not None or site.is_biased or not isinstance(site.attention_mask, MaskPlan):
        return _softmax(site, [], None)
    if site.expanded:
        return engines.run(AttentionCall(site.q, site.k, site.v, site.scale, site.mask, dropout=site.dropout), "fused")
    return stored(site.q, store, site.attention_mask, site.scale, site.dropout)


def _coded(site: Site, store: Store) -> Tensor:
    """Compute the attention of a layer of which some tokens are held encoded."""
    plan = site.attention_mask
    if isinstance(plan, MaskPlan) and site.position_bias is None:
        seen = coded_attention.by_position(plan)
    else:
        seen = coded_attention.by_mask(site.mask, store.n_heads)
    return coded_attention.attend(site.q, store, seen, site.scale, site.softcap, site.sinks, site.dropout)


def stored(q: Tensor, store: Store, plan: MaskPlan, scale: float, dropout: float = 0.0) -> Float[Tensor, "b hq nq dv"]:
    """Compute attention to all that a layer stores, by the fused kernel, one group of equally long heads at a time."""
    if store.codes is not None:
        return coded_attention.attend(q, store, coded_attention.by_position(plan), scale, dropout=dropout)
    groups = q.shape[1] // store.n_heads
    parts = [_group(q[:, _queries(group, groups)], group, groups, plan, scale, dropout) for group in store.groups]
    if len(parts) == 1:
        return parts[0]
    out = parts[0].new_empty(*q.shape[:3], parts[0].shape[-1])
    for group, part in zip(store.groups, parts, strict=True):
        out[:, _queries(group, groups)] = part
    return out


def _queries(group: Group, groups: int) -> slice | Tensor:
    """Return the query heads that read a group."""
    if isinstance(group.index, slice):
        return slice(group.index.start * groups, group.index.stop * groups)
    return query_heads(group.heads, groups)


def _group(q: Tensor, group: Group, groups: int, plan: MaskPlan, scale: float, dropout: float) -> Tensor:
    slots, bias = group.all(), group.bias
    if bias is not None:
        bias = bias.to(q.dtype).repeat_interleave(groups, 1)[:, :, None]
    if plan.sees_all() and not group.has_empty:
        return fused.kernel(q, slots.k, slots.v, scale, bias, dropout)
    if bias is None and not group.has_empty and isinstance(plan, KeptMask) and plan.sees_in_order(group.length):
        return engines.run(AttentionCall(q, slots.k, slots.v, scale, None, True, dropout=dropout), "fused")
    mask = masks.combine(plan.at(slots.positions).repeat_interleave(groups, 1), bias)
    call = AttentionCall(q, slots.k, slots.v, scale, mask, dropout=dropout)
    # without padding the mask hides empty slots alone: no check that waits for the device is needed, since those hold
    # tokens that the sequence itself saw and dropped
    with trusted() if plan.sees_all() else nullcontext():
        return engines.run(call, "fused")


def softmax(
    site: Site, logits: Float[Tensor, "b h q s"], rows: slice = slice(None), heads: slice = slice(None)
) -> Float[Tensor, "b h q s"]:
    """Return the weights for the logits of some rows and heads.

    A learnt sink is one more logit; its weight is left out of the result.
    """
    if site.sinks is None:
        return safe_softmax(logits)
    sinks = site.sinks[:, heads] if site.sinks.shape[2] == 1 else site.sinks[:, heads, rows]
    return torch.cat([logits, sinks.to(logits.dtype).expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]


def query_heads(kv_heads: Tensor, groups: int) -> Tensor:
    """Return the query heads that read some key/value heads."""
    return (kv_heads[:, None] * groups + torch.arange(groups, device=kv_heads.device)).flatten()


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap
