"""Pass calls of transformers' attention interface on to the runs that are open on a module."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from foveate.core.engines import fused
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import attention, pieces
from foveate.host.evict import evict
from foveate.host.hf.adoption import is_recording
from foveate.host.hf.alias import NAME
from foveate.host.hf.attach import OPEN
from foveate.host.hf.cache import SlotLayer
from foveate.host.hf.mask import MaskPlan, describe
from foveate.host.hf.model import native_attention
from foveate.host.hf.sites import site_of
from foveate.host.hf.taking import hand_over
from foveate.host.method import Method
from foveate.host.run import Run
from foveate.host.site import Site
from foveate.host.spans import Spans
from foveate.host.stats import held_at

#: Keywords that change an attention call's mathematics in ways that our own paths do not compute.
_FOREIGN = frozenset({"cache", "sparse_indices", "indices", "block_indices"})

#: Keywords that add more to the softmax than scores and a mask.
_CHANGING = frozenset({"softcap", "position_bias", "s_aux", "sinks"})

#: Arguments of a model's own eager attention that our own paths read too, or may ignore.
_KNOWN = frozenset({
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "position_bias", "sinks",
    "s_aux", "is_causal", "sliding_window", "training", "output_attentions", "kwargs",
})  # fmt: skip


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the function that Foveate registers with transformers: `(B, N, H, D)` output and weights or None."""
    hand_over(query, key, value)
    call, runs = Call(module, query, key, value, attention_mask, options), OPEN.get(module)
    if runs is None:
        name = _implementation_outside(module)
        return call.native((name, native_attention(module, name)))
    first, runs = runs[0], [run for run in runs if run.covers(module)]
    if not runs:
        return call.native(first.native(module))
    outer = next((run for run in runs if run.has_hooks), runs[0])
    started, slots = time.perf_counter(), outer.passes.slots(module)
    done = _without_methods(runs, call, slots) if outer.passes.here.reader is None else None
    if done is not None and all(run.drops_nothing(module, slots) for run in runs):
        for run in runs:
            run.stats.note_native(*run.passes.called(module), query, key, value, slots, time.perf_counter() - started)
        return done
    site = site_of(outer, module, query, key, value, attention_mask, options, slots)
    return _with_methods(runs, outer, call, site, done, started)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the attention interface, as the model makes it."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: dict[str, Any]

    def native(self, native: tuple[str, Callable[..., Any]]) -> Any:
        """Compute the model's own attention, with the model's own mask."""
        implementation, function = native
        mask = self.mask.native(implementation) if isinstance(self.mask, MaskPlan) else self.mask
        return function(self.module, self.q, self.k, self.v, mask, **self.options)

    @property
    def foreign(self) -> list[str]:
        """Names of the call's arguments that our own paths cannot handle."""
        return [name for name in _foreign(type(self.module).__module__) if self.options.get(name) is not None]

    @property
    def is_simple(self) -> bool:
        """Return whether a single query sees every key, and only scores enter the softmax."""
        if self.q.shape[2] > 1 or not isinstance(self.mask, MaskPlan) or not self.mask.sees_all():
            return False
        more = self.options.get("dropout") or any(self.options.get(name) is not None for name in _CHANGING)
        return not more and not self.foreign

    @property
    def scale(self) -> float:
        scaling = self.options.get("scaling")
        return self.q.shape[-1] ** -0.5 if scaling is None else scaling

    def part(self, site: Site) -> Call:
        """Return the call for some of its queries, given as a site."""
        own = {"sinks": site.sinks, "position_bias": site.position_bias}
        given = self.options | {name: value for name, value in own.items() if self.options.get(name) is not None}
        return Call(self.module, site.q, site.new_k, site.new_v, site.attention_mask, given)


def _without_methods(runs: list[Run], call: Call, slots: SlotLayer | None) -> tuple[Tensor, Tensor | None] | None:
    """Compute attention if no method has a hook at this call; None if one has, or if the call is not simple.

    That is the model's own attention or, for a single query, the packed kernel on the stored slots.
    """
    if not all(run.only_drops for run in runs):
        return None
    is_whole = slots is None or slots.is_whole
    if is_whole and not any(run.packs for run in runs):
        plain = all(run.is_plain for run in runs)
        return call.native(runs[0].native(call.module)) if plain else None
    if runs[0].passes.here.wants_weights or not call.is_simple:
        return None
    if is_whole:
        if call.k.shape[1] == call.q.shape[1]:
            return None
        return fused.kernel(call.q, call.k, call.v, call.scale).transpose(1, 2), None
    assert slots is not None and slots.store is not None
    cache, _ = runs[0].passes.called(call.module)
    if cache is None or is_recording(cache) or not slots.handed_over(call.k, call.v):
        return None
    return attention.stored(call.q, slots.store, call.mask, call.scale).transpose(1, 2), None


def _with_methods(
    runs: list[Run], outer: Run, call: Call, site: Site, done: tuple[Tensor, Tensor | None] | None, started: float
) -> tuple[Tensor, Tensor | None]:
    """Compute attention under the methods, unless it is done already, and drop their tokens after the call."""
    reader, density = outer.passes.here.reader, 1.0
    methods = [reader] if reader is not None else [method for run in runs for method in run.methods]
    given = {name: tokens for run in runs for name, tokens in run.given_spans.items()}
    site.spans = Spans(given, outer.passes.here.read, lambda: site.place)
    if methods and (foreign := call.foreign):
        raise UnsupportedModel(f"{type(site.module).__name__} attends with {foreign[0]}, which methods cannot handle")
    if site.cache is None and site.is_causal and (needing := [m for m in methods if m.needs_cache]):
        raise OptionError(
            f"{type(needing[0]).__name__} acts on the cache, and this call has none: leave use_cache=True, and "
            f"gradient checkpointing off"
        )

    def droppers(part: Site) -> list[Method]:
        return [method for run in runs for method in run.methods if reader is None and run.drops_at(part)]

    if done is None:

        def native(part: Site) -> Any:
            return (call if part is site else call.part(part)).native(outer.native(call.module))

        out, density = pieces.run(site, methods, native, droppers)
        done = out.transpose(1, 2).contiguous(), site.weights
    held, elapsed = held_at(site), time.perf_counter() - started

    def finish() -> None:
        started = time.perf_counter()
        if site.slots is not None and (site.slots.window is not None or any(run.evicts for run in runs)):
            evict(site, droppers(site), outer.passes.note_end)
        for run in runs if reader is None else ():
            run.stats.note(site, density, held, elapsed + time.perf_counter() - started)

    outer.passes.at_end(finish)
    return done


@lru_cache(maxsize=256)
def _foreign(file: str) -> tuple[str, ...]:
    """Return the keywords of a model file's eager attention that our own paths cannot handle."""
    eager = getattr(sys.modules[file], "eager_attention_forward", None)
    read = inspect.signature(eager).parameters if eager is not None else {}
    return tuple(sorted(_FOREIGN | (frozenset(read) - _KNOWN)))


def _implementation_outside(module: nn.Module) -> str:
    """Return the implementation of a module that calls the interface but that no run covers."""
    for run in {run for runs in OPEN.values() for run in runs}:
        if id(getattr(module, "config", None)) in run.implementations:
            return run.implementations[id(module.config)]
    raise UnsupportedModel(
        f'attn_implementation="{NAME}" works inside foveate.apply(model, ...) only; call set_attn_implementation first'
    )


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, describe)
