"""Attach a run to a diffusion model: attention modules run under its methods, and keep their processors."""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack
from types import MethodType
from typing import Any, NoReturn, Protocol, final

import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.diffusers.calls import Call, Forward
from foveate.host.diffusers.model import DiffusionHost
from foveate.host.hf.attach import OPEN, runs_open_on
from foveate.host.hf.hooks import Hook


class Attached(Protocol):
    """The attributes of a run that attaching uses; see `foveate.host.diffusers.run.DiffusionRun`."""

    host: DiffusionHost
    methods: list[Any]
    layers: dict[nn.Module, int]
    thread: int
    is_open: bool

    def begin_pass(self) -> None: ...


@final
class Attending:
    """The forward of an attention module while runs are open on it.

    Args:
        module: the module; `own` is the forward that was set on it before, None for that of its class.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, vars(module).get("forward")
        self.native: Forward = module.forward
        functools.update_wrapper(self, self.native)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not runs_open_on(self.module):
            return self.native(*args, **kwargs)
        return Call(self.module, self.native, args, kwargs).run(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return the plain forward of a copy of the model."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return MethodType(type(self.module).forward, memo[id(self.module)])

    def __reduce__(self) -> NoReturn:
        raise OptionError("a model cannot be saved inside foveate.apply(model, ...); leave the block first")


def attach(run: Attached, stack: ExitStack) -> None:
    """Attach a run to its model. Closing the stack detaches it."""
    modules = run.host.attention_modules()
    if any(other.thread != run.thread for module in modules for other in runs_open_on(module)):
        raise OptionError("another thread is inside foveate.apply() on this model; enter once, around both threads")
    for number, module in enumerate(modules):
        run.layers[module] = number
        _open(module, run)
        stack.callback(_close, module, run)
    model = run.host.model
    begin, end = Hook(lambda *call: run.begin_pass()), Hook(lambda module, args, out: _end(run, module, out))
    stack.callback(model.register_forward_pre_hook(begin).remove)
    stack.callback(model.register_forward_hook(end, always_call=True).remove)


def _open(module: nn.Module, run: Attached) -> None:
    OPEN.setdefault(module, []).append(run)
    if len(OPEN[module]) == 1:
        vars(module)["forward"] = Attending(module)


def _close(module: nn.Module, run: Attached) -> None:
    OPEN[module].remove(run)
    if OPEN[module]:
        return
    del OPEN[module]
    attending = vars(module).get("forward")
    if not isinstance(attending, Attending):  # set by others within the block; it calls the plain forward from now on
        return
    if attending.own is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = attending.own


def _end(run: Attached, module: nn.Module, out: Any) -> None:
    """End a pass. If the backward pass will repeat it, check there that the run is still open."""
    run.begin_pass()
    if not run.methods or not torch.is_grad_enabled():
        return
    if any(getattr(each, "gradient_checkpointing", False) for each in module.modules()):
        for value in out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: _check_open(run))


def _check_open(run: Attached) -> None:
    if not run.is_open:
        raise UnsupportedModel(
            "gradient checkpointing runs the model again in the backward pass: run that pass inside the block of "
            "foveate.apply(model, ...) too"
        )
