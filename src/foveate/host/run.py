"""`apply`: put methods on a model for a while, and leave it as it was."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType, TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import attention
from foveate.host.cache import SlotLayer, evict
from foveate.host.mask import MaskPlan, describe
from foveate.host.method import Method, overrides
from foveate.host.model import Host, host, native_attention, native_mask
from foveate.host.site import Site
from foveate.host.stats import Stats, slots_of

NAME = "foveate"

#: The runs that are open on each attention module, outermost first.
_OPEN: WeakKeyDictionary[nn.Module, list[Run]] = WeakKeyDictionary()

#: Keywords of an attention call that change its mathematics in ways a method's path does not know.
_FOREIGN = ("s_aux", "position_bias", "cache")

#: Arguments of an attention module that bring in another sequence.
_CROSS = ("key_value_states", "encoder_hidden_states")


class Run:
    """Methods on a model, from `with apply(...)` until it ends. `stats` says what happened; `spans` names tokens.

    Attributes:
        methods: what is applied, in order.
        spans: named token positions (`image`, `text`, `system` …) that methods may ask sites for; set by the caller.
    """

    def __init__(self, model: object, methods: tuple[Method, ...]) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise OptionError(f"apply() takes Method objects; got {type(method).__name__}")
        self.host: Host = host(model)
        self.methods, self.stats = list(methods), Stats()
        self.spans: dict[str, Tensor] = {}
        self._exit = ExitStack()
        self._layers: dict[nn.Module, int] = {}
        self._implementations: dict[int, str] = {}
        self._call: dict[nn.Module, dict[str, Any]] = {}
        self._memories: WeakKeyDictionary[Cache, dict[Any, Any]] = WeakKeyDictionary()
        self._step: dict[Any, Any] = {}
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise OptionError("this run was used already; call apply() again")
        self._entered = True
        with ExitStack() as stack:  # whatever fails on the way in is undone at once
            for method in self.methods:
                method.bind(self.host)
            self._attach(stack)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # -- putting on and taking off -----------------------------------------------------------------------------------

    def _attach(self, stack: ExitStack) -> None:
        modules = self.host.attention_modules()
        if self._evicts and any(getattr(module, "is_kv_shared_layer", False) for module in modules):
            raise UnsupportedModel("a method that evicts needs layers with keys of their own; this model shares them")
        for index, module in enumerate(modules):
            layer = getattr(module, "layer_idx", None)
            self._layers[module] = layer if isinstance(layer, int) else index
            _OPEN.setdefault(module, []).append(self)
            stack.callback(_close, module, self)
            hook = module.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(hook.remove)
        for module in {self.host.model, self.host.model.base_model}:
            top = module.register_forward_pre_hook(lambda *_: self._step.clear())
            stack.callback(top.remove)
        for config in self.host.configs():
            before = config._attn_implementation_internal
            known = (run._implementations.get(id(config)) for runs in _OPEN.values() for run in runs)
            self._implementations[id(config)] = next(filter(None, known), before)  # an outer run has put ours there
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            config._attn_implementation_internal = NAME
        stack.callback(self._release)

    def _release(self) -> None:
        """Hand caches back with ordinary layers where nothing was dropped; others will refuse to go on alone."""
        others = {run for runs in _OPEN.values() for run in runs if run is not self}
        mine = {id(method) for method in self.methods}
        for cache in list(self._memories):
            sharing = [run for run in others if cache in run._memories]
            for run in sharing:  # it still works on this cache, with what our methods remembered
                _forget(run._memories[cache], lambda key: key[0] in mine)
            if not sharing:
                cache.__dict__.pop("reorder_cache", None)
                cache.layers[:] = [x.released() if isinstance(x, SlotLayer) else x for x in cache.layers]
        self._call.clear()
        self._step.clear()

    # -- during a forward pass ---------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the attention function will not be told: the cache and the hidden states."""
        given = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if args else kwargs
        cache = given.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if any(given.get(name) is not None for name in _CROSS):
            cache = None  # keys of another sequence, which have a cache that nothing is added to
        self._call[module] = {"cache": cache, "hidden": given.get("hidden_states", args[0] if args else None)}
        if isinstance(cache, Cache):
            self._adopt(cache, self._layers[module])

    @property
    def _evicts(self) -> bool:
        return any(method.evicts or overrides(method, "keep") for method in self.methods)

    def _adopt(self, cache: Cache, index: int) -> None:
        """Follow a cache's reorderings, and put our layer in place of its own where a method evicts."""
        if cache not in self._memories:
            self._memories[cache] = {}
            # a bound method, so that a deep copy of the cache reorders the copy
            cache.reorder_cache = MethodType(_reorder_cache, cache)
        if self._evicts:
            while len(cache.layers) <= index:
                cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or not layer.get_seq_length():
            first = min(self._layers.values())
            _forget(self._memories[cache], lambda key: key[1] == index or (key[1] is None and index == first))
        if self._evicts and not isinstance(layer, SlotLayer):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or cache.offloading:
                kind = "offloading " * cache.offloading + f"{type(cache).__name__} of {type(layer).__name__}"
                raise UnsupportedModel(f"past_key_values must be a DynamicCache for a method that evicts; got {kind}")
            layer = cache.layers[index] = SlotLayer(layer)
        if isinstance(layer, SlotLayer):
            layer.is_expected = True

    def site(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Site:
        """This call as methods see it."""
        call, layer = self._call.get(module, {}), self._layers[module]
        cache = call.get("cache")
        slot = cache.layers[layer] if isinstance(cache, Cache) and len(cache.layers) > layer else None
        scaling, causal = options.get("scaling"), options.get("is_causal")
        return Site(
            module=module, layer=layer, q=q, new_k=k, new_v=v,
            scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
            attention_mask=mask,
            is_causal=bool(module.is_causal if causal is None else causal),
            dropout=options.get("dropout") or 0.0,
            softcap=options.get("softcap"),
            slots=slot if isinstance(slot, SlotLayer) else None,
            cache=cache, hidden=call.get("hidden"), step=self._step,
            memories=self._memories.get(cache, {}) if isinstance(cache, Cache) else {},
        )  # fmt: skip

    def native(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        """The model's own attention, on the model's own mask."""
        implementation = self._implementations[id(module.config)]
        function = native_attention(module, implementation)
        return function(module, q, k, v, native_mask(mask, implementation), **options)


def apply(model: object, *methods: Method) -> Run:
    """Apply methods to a pretrained model: `with foveate.apply(model, method, ...) as run:`.

    Args:
        model: any transformers model that goes through its attention interface (decoders, encoders, ViTs, VLMs).
        methods: applied in order; hooks of several compose, the later seeing what the earlier left.

    Within the block the model is used as always (`model(...)`, `model.generate(...)`); runs nest. After it, also after
    an exception, weights, configuration and hooks are what they were. A cache that a method evicted from can go on
    inside another block only; any other is an ordinary one again.

    Raises:
        UnsupportedModel: for a model that does not dispatch its attention.
    """
    return Run(model, methods)


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The function that Foveate registers with transformers: `(B, N, H, D)` output and weights or None."""
    runs = _OPEN.get(module)
    if not runs:
        raise UnsupportedModel(f'attn_implementation="{NAME}" works inside foveate.apply(model, ...) only')
    outer, methods = runs[0], [method for run in runs for method in run.methods]
    begun = time.perf_counter()
    site = outer.site(module, query, key, value, attention_mask, options)
    site.spans = {name: tokens for run in runs for name, tokens in run.spans.items()}
    if methods and (foreign := [name for name in _FOREIGN if options.get(name) is not None]):
        raise UnsupportedModel(f"{type(module).__name__} attends with {foreign[0]}, which methods cannot handle yet")
    out, density = attention.run(
        site, methods, lambda: outer.native(module, query, key, value, attention_mask, options)
    )
    held = slots_of(site)
    if site.slots is not None:
        evict(site, methods)
    for run in runs:
        run.stats.note(site, density, held, time.perf_counter() - begun)
    return out.transpose(1, 2).contiguous(), site.weights


def _close(module: nn.Module, run: Run) -> None:
    _OPEN[module].remove(run)
    if not _OPEN[module]:
        del _OPEN[module]


def _forget(memories: dict[Any, Any], gone: Callable[[Any], bool]) -> None:
    for key in [key for key in memories if gone(key)]:
        del memories[key]


def _reorder_cache(cache: Cache, index: Tensor) -> None:
    """Beam search moves the batch: move the cache, and what the methods of every open run remember of it."""
    type(cache).reorder_cache(cache, index)
    for run in {run for runs in _OPEN.values() for run in runs}:
        for memory in run._memories.get(cache, {}).values():
            for name, value in memory.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == index.shape[0]:
                    memory[name] = value.index_select(0, index.to(value.device))


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, describe)
__all__ = ["MaskPlan", "Run", "Stats", "apply"]
