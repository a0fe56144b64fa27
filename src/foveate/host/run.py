"""`apply`: put methods on a model for a while, and leave it as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.alias import NAME, Alias
from foveate.host.cache import LATEST, SlotLayer
from foveate.host.caches import Caches, cache_among, end_prompt, is_recording, prompt_of
from foveate.host.calls import CROSS, check_expanded, number_of, parameters, sinks, takes_more
from foveate.host.dispatch import OPEN
from foveate.host.hooks import Hook
from foveate.host.mask import MaskPlan
from foveate.host.method import HOOKS, Method, overrides
from foveate.host.model import Host, host, native_attention
from foveate.host.site import Site
from foveate.host.stats import Stats

#: The part of a model that methods act on.
Part = Literal["auto", "decoder", "all"]

#: When methods drop tokens.
Evict = Literal["always", "after prompt"]

_ENTRY = threading.Lock()


class Run:
    """Methods on a model, from `with apply(...)` until it ends. `stats` says what happened; `spans` names tokens.

    Attributes:
        methods: what is applied, in order.
        stats: what happened so far.
        spans: named token positions (`image`, `text`, `system` …) that methods may ask sites for; set by the caller.
        evict: when methods drop tokens.
        tentative: how many tokens at the end of each prompt will be taken back; see `foveate.Context`.
        implementations: each configuration's own attention implementation, by the configuration's id.
        evicts, in_place, packs: what some of the methods do; see `Method`.
        is_plain, only_drops: whether no method has to be asked at a call, or only after it.
        watches: whether the run has hooks on all attention modules that it covers; see `takes_more`.
    """

    def __init__(self, model: object, methods: tuple[Method, ...], on: Part = "auto", evict: Evict = "always") -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise OptionError(f"apply() takes Method objects; got {type(method).__name__}")
        validate.one_of("on", on, ("auto", "decoder", "all"))
        validate.one_of("evict", evict, ("always", "after prompt"))
        self.host: Host = host(model)
        self.methods, self.stats, self.on = list(methods), Stats(), on
        self.evict, self.tentative = evict, 0
        self.spans: dict[str, Tensor] = {}
        self.implementations: dict[int, str] = {}
        self.evicts = any(method.evicts or overrides(method, "keep") for method in methods)
        self.in_place = any(method.in_place for method in methods)
        used = {hook for hook in HOOKS if any(overrides(method, hook) for method in methods)}
        self.is_plain, self.only_drops = not used, used <= {"keep", "fold"}
        self.packs = any(method.packs for method in methods)
        self.watches = self.in_place or not self.is_plain
        self._exit, self._entered, self._thread = ExitStack(), False, 0
        self._layers: dict[nn.Module, tuple[int, int]] = {}
        self._natives: dict[nn.Module, tuple[str, Callable[..., Any]]] = {}
        self._aside: set[nn.Module] = set()
        self._configs: list[Any] = []
        self._local = threading.local()
        self._caches = Caches(self.evicts, self.in_place)

    def __enter__(self) -> Self:
        if self._entered:
            raise OptionError("this run was used already; call apply() again")
        self._entered, self._thread = True, threading.get_ident()
        self._check_cache()
        for method in self.methods:
            method.bind(self.host)
        with _ENTRY, ExitStack() as stack:  # whatever fails on the way in is undone at once
            self._attach(stack)
            self._exit = stack.pop_all()
        return self

    def _check_cache(self) -> None:
        """Refuse, before anything runs, a model whose cache cannot be evicted from."""
        if not self.evicts or any(getattr(method, "is_probe", False) for method in self.methods):
            return
        if self.host.decoder is None:
            raise UnsupportedModel(f"{type(self.host.model).__name__} has no decoder with a cache to evict from")
        if any(getattr(module, "is_kv_shared_layer", False) for module in self.host.scope(self.on)):
            raise UnsupportedModel("a method that evicts needs layers with keys of their own; this model shares them")
        if not any(module in OPEN for module in self.host.attention_modules()):  # else outer methods would see the pass
            from foveate.host.layout import layout  # it applies a method itself

            self._aside = {self.host.model.get_submodule(name) for name in layout(self.host).aside}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _ENTRY:
            self._exit.close()

    # -- putting on and taking off -----------------------------------------------------------------------------------

    def _attach(self, stack: ExitStack) -> None:
        modules = self.host.attention_modules()
        scope = [module for module in self.host.scope(self.on) if module not in self._aside]
        if any(run._thread != self._thread for module in modules for run in OPEN.get(module, ())):
            raise OptionError("another thread is inside foveate.apply() on this model; enter once, around both threads")
        for order, module in enumerate(scope):
            layer = getattr(module, "layer_idx", None)
            self._layers[module] = (layer if isinstance(layer, int) else order, order)
        self._caches.first = min(layer for layer, _ in self._layers.values())
        for module in modules:
            OPEN.setdefault(module, []).append(self)
            stack.callback(_close, module, self)
            if module in self._layers and (self.watches or takes_more(module)):
                stack.callback(module.register_forward_pre_hook(Hook(self._before), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(Hook(self._after), always_call=True).remove)
        if self.methods and "init_continuous_batching" not in vars(self.host.model):
            self.host.model.__dict__["init_continuous_batching"] = MethodType(_no_batching, self.host.model)
            stack.callback(self.host.model.__dict__.pop, "init_continuous_batching")
        for module in {self.host.model, self.host.model.base_model}:
            stack.callback(module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(Hook(self._end), always_call=True).remove)
        self._configs = list(self.host.configs())
        for config in self._configs:
            before = config._attn_implementation_internal
            known = (run.implementations.get(id(config)) for runs in OPEN.values() for run in runs)
            self.implementations[id(config)] = next(filter(None, known), before)  # an outer run has put ours there
            stack.callback(self._give_back, config)
            config._attn_implementation_internal = Alias(self.implementations[id(config)] or "eager")
        self._caches.open()
        stack.callback(self._release)

    def _give_back(self, config: Any) -> None:
        """The last run that is open on a configuration puts back what it found there."""
        others = {id(run): run for runs in OPEN.values() for run in runs if run is not self}
        if not any(id(config) in run.implementations for run in others.values()):
            config._attn_implementation_internal = self.implementations[id(config)]

    def _release(self) -> None:
        others = {id(run): run._caches for runs in OPEN.values() for run in runs if run is not self}
        self._caches.close(self.methods, others.values())
        self._local.__dict__.clear()

    # -- during a forward pass ---------------------------------------------------------------------------------------

    def covers(self, module: nn.Module) -> bool:
        """Whether the methods act on this module."""
        return module in self._layers

    def drops_at(self, site: Site) -> bool:
        """Whether the methods may drop tokens after this call."""
        return self.evict == "always" or site.reads_prompt

    def rests(self, module: nn.Module, slots: SlotLayer | None) -> bool:
        """Whether nothing is to be dropped after a call of one token."""
        if slots is None or slots.is_whole or not self.evicts:
            return not self.evicts and (slots is None or slots.window is None)
        cache, layer = self.called(module)
        return self.evict != "always" and cache is not None and prompt_of(cache, layer, slots.seen - 1) is not None

    def native(self, module: nn.Module) -> tuple[str, Callable[..., Any]]:
        """The attention implementation that this module would use by itself, and its function."""
        found = self._natives.get(module)
        if found is None:
            name = self.implementations[id(module.config)]
            found = self._natives[module] = name, native_attention(module, name)
        return found

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins: what methods note of it is new, and its cache is met before masks are asked for."""
        self._local.step = {}
        if any(config._attn_implementation_internal != NAME for config in self._configs):
            raise UnsupportedModel(
                "set_attn_implementation() inside foveate.apply(model, ...) takes the methods off; call it before"
            )
        if module is self.host.model:
            self._local.asked = kwargs.get("logits_to_keep")
            told = kwargs.get("output_attentions")
            self._local.wants_weights = bool(module.config.output_attentions if told is None else told)
        cache = self._local.cache = cache_among((*args, *kwargs.values()))
        if cache is not None:
            self._caches.meet(cache)

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self._local.step, self._local.cache, LATEST.layer = {}, None, None
        if (
            self.methods
            and torch.is_grad_enabled()
            and any(getattr(x, "gradient_checkpointing", False) for x in module.modules())
        ):
            for value in output.values() if isinstance(output, dict) else ():
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(self._check_open)

    def _check_open(self, gradient: Tensor) -> None:
        """Checkpoints call the model again in the backward pass, with the methods or, after the block, without."""
        if not self._caches.is_open:
            raise UnsupportedModel(
                "gradient checkpointing runs the model again in the backward pass: run that pass inside the block of "
                "foveate.apply(model, ...) too"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember what the attention function will not be told: the cache and the hidden states."""
        given = {**dict(zip(parameters(type(module).forward), args, strict=False)), **kwargs} if args else kwargs
        cache, layer, told = cache_among(given.values()), self._layers[module][0], given.get("layer_idx")
        if isinstance(told, int):
            layer = told
        for name in CROSS:  # such keys have a cache that nothing is added to
            if given.get(name) is not None:
                cache = None
        self._local.call = (cache, given.get("hidden_states", args[0] if args else None), layer)
        LATEST.layer = None
        if cache is not None:
            self._caches.adopt(cache, layer)

    def at_end(self, settle: Callable[[], None]) -> None:
        """Do something when the call is over. Where a module attends several times to what it stored once, only the
        last time counts.
        """
        if getattr(self._local, "call", None) is None:
            settle()
        else:
            self._local.settle = settle

    def _after(self, _: nn.Module, args: object, output: object) -> None:
        """The call is over: drop what is to be dropped, and hold on to nothing of it."""
        settle = self._local.__dict__.pop("settle", None)
        self._local.call = None
        LATEST.layer = None
        if settle is not None and output is not None:  # None after an exception
            settle()

    def called(self, module: nn.Module) -> tuple[Cache | None, int]:
        """The cache and the layer number of the call at hand."""
        call = getattr(self._local, "call", None)
        if call is not None:
            return call[0], call[2]
        return getattr(self._local, "cache", None), self._layers[module][0]  # it has no hooks: see `takes_more`

    @property
    def wants_weights(self) -> bool:
        """Whether the caller of the model asked for attention weights."""
        return getattr(self._local, "wants_weights", False)

    def slots(self, module: nn.Module) -> SlotLayer | None:
        """The call's layer, where it stores its tokens slot by slot, from this run or an earlier one."""
        if getattr(self._local, "call", None) is not None and getattr(LATEST, "layer", None) is not None:
            return LATEST.layer
        cache, number = self.called(module)
        if cache is None or len(cache.layers) <= number:
            return None
        layer = cache.layers[number]
        return layer if isinstance(layer, SlotLayer) else None

    def site(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any],
        slots: SlotLayer | None,
    ) -> Site:  # fmt: skip
        """This call as methods see it."""
        order, hidden = self._layers[module][1], (getattr(self._local, "call", None) or (None, None))[1]
        cache, layer = self.called(module)
        if slots is None and isinstance(cache, Cache) and len(cache.layers) > layer:
            held = cache.layers[layer]
            slots = held if isinstance(held, SlotLayer) else None
        elif slots is not None and isinstance(cache, Cache):
            layer = number_of(cache, slots, layer)
        scaling, causal = options.get("scaling"), options.get("is_causal")
        site = Site(
            module=module, layer=layer, order=order, q=q, new_k=k, new_v=v,
            scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
            attention_mask=mask,
            is_causal=bool(module.is_causal if causal is None else causal),
            dropout=options.get("dropout") or 0.0,
            softcap=options.get("softcap"),
            sinks=sinks(options),
            position_bias=options.get("position_bias"),
            slots=slots if cache is not None else None,
            cache=cache, hidden=hidden, step=self._step(), wants_weights=self.wants_weights,
            memories=self._caches.memories.get(cache, {}) if isinstance(cache, Cache) else {},
        )  # fmt: skip
        if site.slots is not None and not site.slots.handed_over(k, v):
            if site.slots.is_whole and not any(run.evicts and run.covers(module) for run in OPEN.get(module, ())):
                site.slots = None  # the model made something of all that is there: as with an ordinary layer
            else:
                check_expanded(site)
                site.expanded = True
        if site.slots is not None:
            site.__dict__["seen"] = site.slots.seen
        if isinstance(cache, Cache):
            first = mask.first_key if isinstance(mask, MaskPlan) else 0
            if site.slots is None and (surplus := first + k.shape[2] - site.seen) > 0:
                site.cut(surplus)
            self._place(site, cache)
        return site

    def _place(self, site: Site, cache: Cache) -> None:
        """Note where in its sequence a call stands: within its prompt or later, and how many tokens will be taken back.

        Assisted decoding asks for the logits of the token before its drafts and of each of them.
        """
        n, past = site.q.shape[2], site.seen - site.q.shape[2]
        site.prompt, site.drafts = prompt_of(cache, site.layer, past), is_recording(cache)
        told = getattr(self._local, "asked", None)
        asked = told if isinstance(told, int) and told > 0 else None
        if site.drafts:
            site.tentative = min(n, asked or n) - 1
        elif site.prompt is None:
            site.tentative = min(n, self.tentative)
        # a model that cannot be told has read its prompt as nothing but drafts: it is dropped from one call later
        site.reads_prompt = site.prompt is None and (site.phase == "prefill" or (site.drafts and asked is None))
        if site.phase == "decode" and site.prompt is None:
            end_prompt(cache, site.layer, past)

    def _step(self) -> dict[Any, Any]:
        if not hasattr(self._local, "step"):
            self._local.step = {}
        return self._local.step


def apply(model: object, *methods: Method, on: Part = "auto", evict: Evict = "always") -> Run:
    """Apply methods to a pretrained model: `with foveate.apply(model, method, ...) as run:`.

    Args:
        model: any transformers model that goes through its attention interface (decoders, encoders, ViTs, VLMs).
        methods: applied in order; hooks of several compose, the later seeing what the earlier left.
        on: the part that they act on: "decoder", "all", or "auto", the decoder of a model that has one and all of any
            other. A vision tower or an encoder in front of a decoder attends natively unless "all" is asked for.
        evict: "always" drops tokens after every call, as a method says; "after prompt" only while the prompt is read,
            in one call or in several. It ends with the first call that decodes (see `Site.phase`). Later tokens all
            stay, so that the cache can be cropped back to the prompt.

    Within the block the model is used as always (`model(...)`, `model.generate(...)`), also from several threads; runs
    nest. After it, also after an exception, weights, configuration and hooks are what they were. A cache whose heads
    hold equally many tokens goes on without Foveate; one with different numbers goes on inside another block.

    Raises:
        UnsupportedModel: for a model that does not dispatch its attention.
    """
    return Run(model, methods, on, evict)


def _no_batching(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    """Stand in for `init_continuous_batching` where methods are applied: it works in a thread that would only log."""
    if any(run.methods for module in model.modules() for run in OPEN.get(module, ())):
        raise UnsupportedModel(
            "continuous batching keeps pages in place of a cache, and methods cannot act on them; use model.generate() "
            "inside foveate.apply(model, ...)"
        )
    return type(model).init_continuous_batching(model, *args, **options)  # a copy that was made inside a block


def _close(module: nn.Module, run: Run) -> None:
    OPEN[module].remove(run)
    if not OPEN[module]:
        del OPEN[module]


__all__ = ["MaskPlan", "Run", "Stats", "apply"]
