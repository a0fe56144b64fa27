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
from foveate.host import pieces
from foveate.host.alias import NAME
from foveate.host.cache import LATEST, SlotLayer, evict
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
    outer, slots = runs[0], getattr(LATEST, "layer", None)
    if not outer.covers(module):
        return _native(outer.native(module), module, query, key, value, attention_mask, options)
    begun = time.perf_counter()
    plain = all(run.is_plain for run in runs) and _is_ordinary(slots or outer.slots())
    if plain and (found := _plain(runs, module, query, key, value, attention_mask, options)) is not None:
        out, weights = found
        for run in runs:
            run.stats.note_native(*run.called(module), query, key, value, time.perf_counter() - begun)
        return out, weights
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

    out, density = pieces.run(site, methods, native)
    held, spent = slots_of(site), time.perf_counter() - begun

    def settle() -> None:
        begun = time.perf_counter()
        if site.slots is not None and (site.slots.window is not None or any(run.evicts for run in runs)):
            evict(site, [method for run in runs for method in run.methods if run.drops_at(site)])
        for run in runs:
            run.stats.note(site, density, held, spent + time.perf_counter() - begun)

    outer.at_end(settle)
    return out.transpose(1, 2).contiguous(), site.weights


@lru_cache(maxsize=256)
def _foreign(file: str) -> frozenset[str]:
    """Keywords of a model file's attention calls that a method's path cannot handle: its eager form reads them."""
    eager = getattr(sys.modules[file], "eager_attention_forward", None)
    read = inspect.signature(eager).parameters if eager is not None else {}
    return _FOREIGN | (frozenset(read) - _KNOWN)


def _is_ordinary(slots: SlotLayer | None) -> bool:
    """Whether a layer hands all its tokens to attention, and none has to be dropped."""
    return slots is None or (slots.window is None and slots.is_whole)


def _plain(
    runs: list[Run], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """A call at which no method has to be asked: the model's own attention, or, of a single query, the packed kernel.

    None where the packed kernel is wanted, and the call has more to it.
    """
    if not any(run.packs for run in runs):
        return _native(runs[0].native(module), module, q, k, v, mask, options)
    alone = q.shape[2] == 1 and k.shape[1] < q.shape[1] and isinstance(mask, MaskPlan) and mask.sees_all()
    if not alone or options.get("dropout") or _adds(module, options):
        return None
    scaling = options.get("scaling")
    return fused.kernel(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling).transpose(1, 2), None


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
