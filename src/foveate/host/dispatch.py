"""Dispatch: from transformers' attention interface to the runs that are open on a module."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from foveate.core.engines import fused
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import attention, pieces
from foveate.host.alias import NAME
from foveate.host.cache import LATEST, SlotLayer, evict
from foveate.host.caches import is_recording
from foveate.host.mask import MaskPlan, describe
from foveate.host.model import native_attention
from foveate.host.stats import slots_of

if TYPE_CHECKING:
    from foveate.host.run import Run
    from foveate.host.site import Site

#: The runs that are open on each attention module, outermost first.
OPEN: WeakKeyDictionary[nn.Module, list[Run]] = WeakKeyDictionary()

#: Keywords of an attention call that change its mathematics in ways a method's path does not know.
_FOREIGN = frozenset({"cache", "sparse_indices", "indices", "block_indices"})

#: Keywords that put more into the softmax than scores and a mask.
_CHANGING = frozenset({"softcap", "position_bias", "s_aux", "sinks"})

#: What the model's own eager attention may read that a method's path reads too, or may leave.
_KNOWN = frozenset({
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "position_bias", "sinks",
    "s_aux", "is_causal", "sliding_window", "training", "output_attentions", "kwargs",
})  # fmt: skip


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The function that Foveate registers with transformers: `(B, N, H, D)` output and weights or None."""
    runs = OPEN.get(module)
    if runs is None:
        name = _stranger(module)
        return _native((name, native_attention(module, name)), module, query, key, value, attention_mask, options)
    outer = runs[0]
    if not outer.covers(module):
        return _native(outer.native(module), module, query, key, value, attention_mask, options)
    begun, slots = time.perf_counter(), getattr(LATEST, "layer", None) or outer.slots()
    done = _unasked(runs, module, query, key, value, attention_mask, options, slots)
    if done is not None and all(run.rests(module, slots) for run in runs):
        for run in runs:
            run.stats.note_native(*run.called(module), query, key, value, slots, time.perf_counter() - begun)
        return done
    methods = [method for run in runs for method in run.methods]
    site = outer.site(module, query, key, value, attention_mask, options, slots)
    site.spans = {name: tokens for run in runs for name, tokens in run.spans.items()}
    foreign = sorted(name for name in _foreign(type(module).__module__) if options.get(name) is not None)
    if methods and foreign:
        raise UnsupportedModel(f"{type(module).__name__} attends with {foreign[0]}, which methods cannot handle")
    if site.cache is None and site.is_causal and (needing := [m for m in methods if m.needs_cache]):
        raise OptionError(
            f"{type(needing[0]).__name__} acts on the cache, and this call has none: leave use_cache=True, and "
            f"gradient checkpointing off"
        )

    def native(part: Site) -> Any:
        q, k, v, mask, given = query, key, value, attention_mask, options
        if part is not site:
            q, k, v, mask = part.q, part.new_k, part.new_v, part.attention_mask
            own = {"sinks": part.sinks, "position_bias": part.position_bias}
            given = options | {name: value for name, value in own.items() if options.get(name) is not None}
        return _native(outer.native(module), module, q, k, v, mask, given)

    density = 1.0
    if done is None:
        out, density = pieces.run(site, methods, native)
        done = out.transpose(1, 2).contiguous(), site.weights
    held, spent = slots_of(site), time.perf_counter() - begun

    def settle() -> None:
        begun = time.perf_counter()
        if site.slots is not None and (site.slots.window is not None or any(run.evicts for run in runs)):
            evict(site, [method for run in runs for method in run.methods if run.drops_at(site)])
        for run in runs:
            run.stats.note(site, density, held, spent + time.perf_counter() - begun)

    outer.at_end(settle)
    return done


@lru_cache(maxsize=256)
def _foreign(file: str) -> frozenset[str]:
    """Keywords of a model file's attention calls that a method's path cannot handle: its eager form reads them."""
    eager = getattr(sys.modules[file], "eager_attention_forward", None)
    read = inspect.signature(eager).parameters if eager is not None else {}
    return _FOREIGN | (frozenset(read) - _KNOWN)


def _unasked(
    runs: list[Run], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any],
    slots: SlotLayer | None,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """Attention at a call in which no method has a say; None where one has, or where the call has more to it.

    That is the model's own, or, of a single query, the packed kernel on what is stored.
    """
    if not all(run.only_drops for run in runs):
        return None
    is_whole = slots is None or (slots.window is None and slots.is_whole)
    if is_whole and not any(run.packs for run in runs):
        plain = all(run.is_plain for run in runs)
        return _native(runs[0].native(module), module, q, k, v, mask, options) if plain else None
    if q.shape[2] > 1 or not isinstance(mask, MaskPlan) or not mask.sees_all():
        return None
    if options.get("dropout") or _adds(module, options):
        return None
    scale = q.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    if is_whole:
        return (fused.kernel(q, k, v, scale).transpose(1, 2), None) if k.shape[1] < q.shape[1] else None
    cache, _ = runs[0].called(module)
    if cache is None or is_recording(cache) or not slots.handed_over(k, v):  # type: ignore[union-attr]
        return None
    return attention.stored(q, slots.store, mask, scale).transpose(1, 2), None  # type: ignore[union-attr, arg-type]


def _adds(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether a call brings more than queries, keys, values and a mask."""
    return any(options.get(name) is not None for name in _foreign(type(module).__module__) | _CHANGING)


def _native(
    native: tuple[str, Callable[..., Any]], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """The model's own attention, on the model's own mask."""
    implementation, function = native
    mask = mask.native(implementation) if isinstance(mask, MaskPlan) else mask
    return function(module, q, k, v, mask, **options)


def _stranger(module: nn.Module) -> str:
    """The implementation of a module that calls the interface without being known as an attention module."""
    for run in {run for runs in OPEN.values() for run in runs}:
        if id(getattr(module, "config", None)) in run.implementations:
            return run.implementations[id(module.config)]
    raise UnsupportedModel(
        f'attn_implementation="{NAME}" works inside foveate.apply(model, ...) only; call set_attn_implementation first'
    )


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, describe)
