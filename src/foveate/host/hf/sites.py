"""Make a site from an attention call of a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.host.hf.adoption import end_prompt, is_recording, prompt_of
from foveate.host.hf.attach import runs_open_on
from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.calls import check_expanded, number_of, sinks
from foveate.host.hf.mask import MaskPlan
from foveate.host.own_sequence import OwnSequence
from foveate.host.site import Site

if TYPE_CHECKING:
    from foveate.host.run import Run


def site_of(
    run: Run, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any],
    slots: SlotLayer | None,
) -> Site:  # fmt: skip
    """Return the site of a call of the attention interface.

    Args:
        run: the run whose hooks recorded the module's call.
        module, q, k, v, mask, options: the arguments of the attention function.
        slots: the layer that stores the call's tokens, if it does so in slots.
    """
    here, (cache, layer) = run.passes.here, run.passes.called(module)
    crossing = here.call if here.call is not None and here.call.crosses else None
    sequence = cache if crossing is None else crossing.sequence
    if slots is None and cache is not None and len(cache.layers) > layer:
        held = cache.layers[layer]
        slots = held if isinstance(held, SlotLayer) else None
    elif slots is not None and cache is not None:
        layer = number_of(cache, slots, layer)
    scaling, causal = options.get("scaling"), options.get("is_causal")
    site = Site(
        module=module, layer=layer, order=run.passes.layers[module][1], q=q, new_k=k, new_v=v,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask=mask,
        is_causal=bool(module.is_causal if causal is None else causal),
        dropout=options.get("dropout") or 0.0,
        softcap=options.get("softcap"),
        sinks=sinks(options),
        position_bias=options.get("position_bias"),
        slots=slots if cache is not None else None,
        cache=cache, hidden=None if here.call is None else here.call.hidden, step=here.step,
        wants_weights=here.wants_weights,
        ids=_ids(run, q), is_branch=run.passes.here.is_branch,
        all_notes={} if sequence is None else run.caches.notes.get(sequence, {}),
        own=None if crossing is None else here.own,
    )  # fmt: skip
    if site.slots is not None and not site.slots.handed_over(k, v):
        if site.slots.is_whole and not any(other.evicts and other.covers(module) for other in runs_open_on(module)):
            site.slots = None  # the model changed all stored keys, as it does with an ordinary layer
        else:
            check_expanded(site)
            site.expanded = True
    if site.slots is not None:
        site.__dict__["seen"] = site.slots.seen
    if cache is not None:
        first = mask.first_key if isinstance(mask, MaskPlan) else 0
        if site.slots is None and (surplus := first + k.shape[2] - site.seen) > 0:
            site.cut(surplus)
        _locate(run, site, cache)
    if crossing is None:
        here.own = OwnSequence(site.seen - site.tokens, site.attention_mask)
    return site


def _ids(run: Run, q: Tensor) -> Tensor | None:
    """Return the tokens of the queries; None if the pass has others, as in a model with an encoder."""
    ids = run.passes.here.ids
    if ids is None or run.host.config.is_encoder_decoder or ids.shape != (q.shape[0], q.shape[2]):
        return None
    return ids


def _locate(run: Run, site: Site, cache: Cache) -> None:
    """Record whether a call belongs to the prompt, and how many of its tokens will be removed again.

    Assisted decoding requests the logits of the token before its drafts and of each draft.
    """
    n, past = site.q.shape[2], site.seen - site.tokens
    if run.passes.here.reader is not None:
        site.tentative, site.reads_prompt = n, False
        return
    site.prompt, site.drafts = prompt_of(cache, site.layer, past), is_recording(cache)
    given = run.passes.here.logits_to_keep
    logits = given if isinstance(given, int) and given > 0 else None
    if site.drafts:
        site.tentative = min(n, logits or n) - 1
    elif site.prompt is None:
        site.tentative = min(n, run.tentative)
    # without `logits_to_keep` the whole prompt counts as drafts: tokens are then dropped one call later
    site.reads_prompt = site.prompt is None and (site.phase == "prefill" or (site.drafts and logits is None))
    if site.phase == "decode" and site.prompt is None:
        end_prompt(cache, site.layer, past)
