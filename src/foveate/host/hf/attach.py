"""Attach a run to a model: hooks on its modules, and Foveate's name in its configurations."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.hf.adoption import Caches
from foveate.host.hf.alias import NAME, Alias
from foveate.host.hf.calls import takes_more
from foveate.host.hf.hooks import Hook
from foveate.host.hf.model import Host
from foveate.host.hf.passes import Passes
from foveate.host.hf.stacks import image_attention
from foveate.host.spans import Spans
from foveate.host.stack_part import StackPart
from foveate.host.stream import Stream


class Attached(Protocol):
    """The attributes of a run that attaching uses; see `foveate.host.Run`."""

    host: Host
    methods: list[Any]
    thread: int
    has_hooks: bool
    drops: bool
    streams: dict[StackPart, Stream]
    evicts: bool
    implementations: dict[int, str]
    caches: Caches
    passes: Passes

    @property
    def on(self) -> str: ...

    def covers(self, module: nn.Module) -> bool: ...

    def hook_edits(self, stack: ExitStack) -> None: ...

    def spans_at(
        self, first: int, stop: int, batch: int, device: torch.device | None = None, index: Tensor | None = None
    ) -> Spans: ...


#: The runs that are open on each attention module, outermost first.
OPEN: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def runs_open_on(module: nn.Module) -> list[Any]:
    """Return the runs that are open on an attention module, outermost first."""
    return OPEN.get(module, [])


def attach(run: Attached, excluded: set[nn.Module], stack: ExitStack) -> None:
    """Attach a run to its model. Closing the stack detaches it.

    Args:
        run: the run.
        excluded: attention modules that the run leaves unchanged.
        stack: collects the steps that undo the attaching.
    """
    model, modules = run.host.model, run.host.attention_modules()
    if any(other.thread != run.thread for module in modules for other in runs_open_on(module)):
        raise OptionError("another thread is inside foveate.apply() on this model; enter once, around both threads")
    scope = [module for module in run.host.scope(run.on) if module not in excluded]
    if run.on == "auto" and any("image" in method.drops_in for method in run.methods):
        scope += [module for module in image_attention(run.host) if module not in scope]
    for order, module in enumerate(scope):
        layer = getattr(module, "layer_idx", None)
        run.passes.layers[module] = (layer if isinstance(layer, int) else order, order)
    run.caches.first = min(layer for layer, _ in run.passes.layers.values())
    for module in modules:
        OPEN.setdefault(module, []).append(run)
        stack.callback(_close, module, run)
        if run.covers(module) and (run.has_hooks or takes_more(module)):
            _hook(module, run.passes.before, run.passes.after, stack)
    if run.methods and "init_continuous_batching" not in vars(model):
        model.__dict__["init_continuous_batching"] = MethodType(_no_batching, model)
        stack.callback(model.__dict__.pop, "init_continuous_batching")
    run.hook_edits(stack)
    configs = list(run.host.configs())
    for module in {model, model.base_model, run.host.decoder or model}:
        _hook(module, partial(_begin, run, configs), partial(run.passes.end, has_methods=bool(run.methods)), stack)
    for config in configs:
        before = config._attn_implementation_internal
        known = (other.implementations.get(id(config)) for other in _others(run))
        run.implementations[id(config)] = next(filter(None, known), before)  # in a nested run, `before` is our own name
        stack.callback(_restore, run, config)
        config._attn_implementation_internal = Alias(run.implementations[id(config)] or "eager")
    run.caches.open()
    stack.callback(_release, run)


def _hook(module: nn.Module, before: Any, after: Any, stack: ExitStack) -> None:
    stack.callback(module.register_forward_pre_hook(Hook(before), with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(Hook(after), always_call=True).remove)


def _begin(run: Attached, configs: list[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(config._attn_implementation_internal != NAME for config in configs):
        raise UnsupportedModel(
            "set_attn_implementation() inside foveate.apply(model, ...) removes the methods; call it before the block"
        )
    run.passes.begin(module, args, kwargs, is_whole=module is run.host.model)


def _others(run: Attached) -> list[Attached]:
    """Return the other runs that are open, on any model."""
    return list({id(other): other for runs in OPEN.values() for other in runs if other is not run}.values())


def _restore(run: Attached, config: Any) -> None:
    """Restore a configuration's implementation, unless another run is still open on it."""
    if not any(id(config) in other.implementations for other in _others(run)):
        config._attn_implementation_internal = run.implementations[id(config)]


def _release(run: Attached) -> None:
    run.caches.close(run.methods, [other.caches for other in _others(run)])
    run.passes.close()


def _close(module: nn.Module, run: Attached) -> None:
    OPEN[module].remove(run)
    if not OPEN[module]:
        del OPEN[module]


def _no_batching(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
    """Refuse continuous batching while methods are applied. It works in a thread, which would only log the error."""
    if any(run.methods for module in model.modules() for run in runs_open_on(module)):
        raise UnsupportedModel(
            "continuous batching stores pages instead of a cache, and methods cannot act on pages; use "
            "model.generate() inside foveate.apply(model, ...)"
        )
    return type(model).init_continuous_batching(model, *args, **options)  # for copies of the model
