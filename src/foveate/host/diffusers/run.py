"""A run on a diffusion model: methods for the length of a `with apply(...)` block."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, cast, final

from torch import nn

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.diffusers.attach import attach
from foveate.host.diffusers.model import DiffusionHost, diffusion_host
from foveate.host.hf.model import Host
from foveate.host.method import Method, check_methods, overrides
from foveate.host.operator_swap import PrefillSwap
from foveate.host.stats import Stats

_ENTRY = threading.Lock()


@final
class DiffusionRun:
    """Methods on a diffusion model, for the length of a `with apply(...)` block.

    Methods get a `Site` at each softmax attention: of image tokens to each other, to the prompt (`site.crosses`, with
    the prompt's hidden states in `site.context`), or to both joined. No site has a cache, and each call is a sequence
    of its own. `site.step` lasts for one forward pass, which is one denoising step.

    Args:
        model: a network of diffusers, or any other whose attention modules hold processors.
        methods: the methods, in order.
        on: "auto" or "all", which are the same here.

    Attributes:
        methods, stats: see `foveate.host.Run`.
        spans: named tokens of the prompt, set by the caller: positions `(M,)`, or bool `(S,)` or `(B, S)`. Sites of
            cross-attention show them beside their keys. See `foveate.host.word_spans`.
        layers: each attention module with its number.
        is_open: whether the block has begun and not ended.
    """

    def __init__(self, model: nn.Module, methods: tuple[Method, ...], on: str = "auto") -> None:
        check_methods(methods)
        validate.one_of("on", on, ("auto", "all"))
        self.host: DiffusionHost = diffusion_host(model)
        for method in methods:
            _refuse(method, type(model).__name__)
        self.methods, self.stats, self.spans = list(methods), Stats(), dict[str, Any]()
        self.layers: dict[nn.Module, int] = {}
        self.thread, self.is_open = 0, False
        self._exit, self._entered, self._local = ExitStack(), False, threading.local()

    def __enter__(self) -> Self:
        if self._entered:
            raise OptionError("this run was used already; call apply() again")
        self._entered, self.thread = True, threading.get_ident()
        host = cast("Host", self.host)  # both kinds have the sizes that methods read
        for method in self.methods:
            method.bind(host)
        with _ENTRY, ExitStack() as stack:  # a failure while entering is undone at once
            attach(self, stack)
            for method in self.methods:
                for handle in method.hooks(host):
                    stack.callback(handle.remove)
            self._exit = stack.pop_all()
        self.is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open = False
        with _ENTRY:
            self._exit.close()
        self._local.__dict__.clear()

    @property
    def step(self) -> dict[Any, Any]:
        """The methods' notes on the forward pass of this thread."""
        step: dict[Any, Any] = self._local.__dict__.setdefault("step", {})
        return step

    def begin_pass(self) -> None:
        """Forget the methods' notes on the pass before."""
        self._local.step = {}


def _refuse(method: Method, model: str) -> None:
    """Refuse a method that acts on what a diffusion model does not have."""
    name = type(method).__name__
    cached = method.evicts or method.needs_cache or method.in_place
    if cached or any(overrides(method, hook) for hook in ("keep", "fold", "refit", "encode")):
        raise UnsupportedModel(f"{name} acts on a cache of keys and values, and the diffusion model {model} has none")
    if isinstance(method, PrefillSwap):
        operator = method.operator.name
        raise UnsupportedModel(f"{operator} replaces attention while a prompt is read, and {model} reads none")
    for hook, thing in (("edit_hidden", "a decoder's blocks"), ("edit_next_token", "a next token")):
        if overrides(method, hook):
            raise UnsupportedModel(f"{name} edits {thing}, which the diffusion model {model} does not have")
