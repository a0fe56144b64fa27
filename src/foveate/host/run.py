"""`apply`: put methods on a model for a while, and leave it as it was."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import attention
from foveate.host.cache import SlotLayer
from foveate.host.mask import MaskPlan, describe
from foveate.host.method import Method, overrides
from foveate.host.model import Host, host, native_attention, native_mask
from foveate.host.site import Site

NAME = "foveate"

#: The runs that are open on each attention module, outermost first.
_OPEN: WeakKeyDictionary[nn.Module, list[Run]] = WeakKeyDictionary()

#: Keywords of an attention call that change its mathematics in ways a method's path does not know.
_FOREIGN = ("s_aux", "position_bias", "cache")


@dataclass
class Stats:
    """What a run has done so far.

    Args:
        calls: attention calls.
        seconds: time in attention.
        kept: share of the full cache's slots that are stored, at the last call (1.0 where nothing is evicted).
        read: mean share of the keys that decoding queries read.
        cache_bytes: bytes of keys and values stored at the last call; `cache_peak` the most at any call.
    """

    calls: int = 0
    seconds: float = 0.0
    cache_peak: int = 0
    _layers: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    _reads: list[float] = field(default_factory=list)

    @property
    def kept(self) -> float:
        full = sum(full for _, full, _ in self._layers.values())
        return sum(stored for stored, _, _ in self._layers.values()) / full if full else 1.0

    @property
    def read(self) -> float:
        return sum(self._reads) / len(self._reads) if self._reads else 1.0

    @property
    def cache_bytes(self) -> int:
        return sum(size for _, _, size in self._layers.values())

    def note(self, site: Site, density: float, seconds: float) -> None:
        self.calls += 1
        self.seconds += seconds
        b, hkv = site.new_k.shape[:2]
        stored, full = b * hkv * site.k.shape[2], b * hkv * site.seen
        size = site.new_k.element_size() * (site.new_k.shape[-1] + site.new_v.shape[-1])
        if site.slots is not None and site.slots.store is not None:
            stored = site.slots.store.stored
        self._layers[site.layer] = (min(stored, full), full, stored * size)
        self.cache_peak = max(self.cache_peak, self.cache_bytes)
        if site.phase == "decode":
            self._reads.append(density * min(1.0, stored / full))


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
        self.methods, self.stats, self.spans = list(methods), Stats(), {}
        self.spans: dict[str, Tensor]
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.close()

    # -- putting on and taking off -----------------------------------------------------------------------------------

    def _attach(self, stack: ExitStack) -> None:
        modules = self.host.attention_modules()
        for index, module in enumerate(modules):
            layer = getattr(module, "layer_idx", None)
            self._layers[module] = layer if isinstance(layer, int) else index
            _OPEN.setdefault(module, []).append(self)
            stack.callback(_close, module, self)
            hook = module.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(hook.remove)
        top = self.host.model.register_forward_pre_hook(lambda *_: self._step.clear())
        stack.callback(top.remove)
        for config in self.host.configs():
            before = config._attn_implementation_internal
            outer = next((r for runs in _OPEN.values() for r in runs if r is not self and id(config) in r._implementations), None)
            self._implementations[id(config)] = outer._implementations[id(config)] if outer else before
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            config._attn_implementation_internal = NAME
        stack.callback(self._release)

    def _release(self) -> None:
        """Hand caches back: ordinary layers where nothing was dropped, closed ones where something was."""
        others = {run for runs in _OPEN.values() for run in runs if run is not self}
        for cache in list(self._memories):
            if any(cache in run._memories for run in others):
                continue  # an outer run still works on it
            cache.__dict__.pop("reorder_cache", None)
            for index, layer in enumerate(cache.layers):
                if isinstance(layer, SlotLayer):
                    layer.closed = True
                    if layer.is_whole:
                        cache.layers[index] = layer.to_native()
        self._call.clear()
        self._step.clear()

    # -- during a forward pass ---------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the attention function will not be told: the cache and the hidden states."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        self._call[module] = {"cache": cache, "hidden": hidden}
        if isinstance(cache, Cache):
            self._adopt(cache, self._layers[module])

    def _adopt(self, cache: Cache, layer: int) -> None:
        if cache not in self._memories:
            self._memories[cache] = {}
            original = cache.reorder_cache

            def reorder(index: Tensor) -> None:
                original(index)
                _reorder(self._memories.get(cache, {}), index)

            cache.reorder_cache = reorder  # type: ignore[method-assign]
        if any(method.evicts for method in self.methods):
            while len(cache.layers) <= layer:
                cache.layers.append(DynamicLayer())
            native = cache.layers[layer]
            if isinstance(native, SlotLayer):
                return
            if not isinstance(native, DynamicLayer):
                raise UnsupportedModel(f"a method that evicts needs a DynamicCache; layer {layer} is {type(native).__name__}")
            cache.layers[layer] = SlotLayer(native)

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

    Within the block the model is used as always (`model(...)`, `model.generate(...)`); runs nest. After it, also after an
    exception, weights, configuration and hooks are what they were.

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
    out, density = attention.run(site, methods, lambda: outer.native(module, query, key, value, attention_mask, options))
    if site.slots is not None:
        _evict(site, methods)
    for run in runs:
        run.stats.note(site, density, time.perf_counter() - begun)
    return out.transpose(1, 2).contiguous(), site.weights


def _evict(site: Site, methods: list[Method]) -> None:
    """After the call: drop what some method drops, and what has left a sliding layer's window."""
    layer = site.slots
    assert layer is not None and layer.store is not None
    keeping = [(m, kept) for m in methods if overrides(m, "keep") and m.at(site) and (kept := m.keep(site)) is not None]
    keep = torch.ones_like(site.positions, dtype=torch.bool) if keeping or layer.window is not None else None
    if keep is None:
        return
    if layer.window is not None:
        keep = keep & (site.positions > layer.seen - layer.window)
    for method, kept in keeping:
        if kept.shape != site.positions.shape:
            raise OptionError(f"keep() of {type(method).__name__} must be {tuple(site.positions.shape)}; got {tuple(kept.shape)}")
        keep = keep & kept
    folding = [m for m, _ in keeping if overrides(m, "fold")]
    fold = (lambda dropped, summary: folding[-1].fold(site, dropped, summary)) if folding else None
    layer.store = layer.store.evict(keep, fold)


def _close(module: nn.Module, run: Run) -> None:
    _OPEN[module].remove(run)
    if not _OPEN[module]:
        del _OPEN[module]


def _reorder(memories: dict[Any, Any], index: Tensor) -> None:
    """Beam search moved the batch: move what methods remember of it."""
    for memory in memories.values():
        for name, value in memory.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == index.shape[0]:
                memory[name] = value.index_select(0, index.to(value.device))


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, describe)
__all__ = ["MaskPlan", "Run", "Stats", "apply"]
