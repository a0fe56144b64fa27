"""One call of an attention module of a diffusion model: its site, and its attention under methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModel
from foveate.host import attention
from foveate.host.hf.attach import runs_open_on
from foveate.host.hf.tokens_read import named_inputs
from foveate.host.own_sequence import OwnSequence
from foveate.host.sdpa import SDPA, CatchSDPA
from foveate.host.site import Site
from foveate.host.spans import Place, Spans
from foveate.host.stats import Stats, held_at

Forward = Callable[..., Any]


class OpenRun(Protocol):
    """The attributes of a run that a call uses; see `foveate.host.diffusers.run.DiffusionRun`."""

    methods: list[Any]
    stats: Stats
    spans: dict[str, Any]
    layers: dict[nn.Module, int]

    @property
    def step(self) -> dict[Any, Any]: ...


class Call:
    """One call of an attention module; its processor may attend several times.

    Args:
        module: the attention module.
        forward: its own forward.
        args, kwargs: the arguments.
    """

    def __init__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.forward, self.attended = module, forward, 0
        self.runs: list[OpenRun] = runs_open_on(module)
        self.methods = [method for run in self.runs for method in run.methods]
        given = named_inputs(module, args, kwargs)
        self.hidden: Tensor = given.get("hidden_states", args[0] if args else None)
        context = given.get("encoder_hidden_states")
        self.context = context[0] if isinstance(context, tuple) else context  # an image prompt comes beside the text

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output under the methods."""
        with CatchSDPA(self.attend):
            out = self.forward(*args, **kwargs)
        if self.methods and not self.attended:
            raise UnsupportedModel(
                f"{type(self.module.processor).__name__} of {type(self.module).__name__} does not call "
                f"scaled_dot_product_attention, so that no method reaches it: set AttnProcessor2_0 before the block"
            )
        return out

    def attend(self, sdpa: SDPA, native: Callable[[], Tensor]) -> Tensor:
        """Return the output `(B, H, N, Dv)` of one attention."""
        self.attended += 1
        if sdpa.q.dim() != 4:
            if self.methods:
                raise UnsupportedModel(f"{type(self.module).__name__} attends with q of {sdpa.q.dim()} axes, not 4")
            return native()
        started, site = time.perf_counter(), self._site(sdpa)
        out, density = attention.run(site, self.methods, lambda part: (native().transpose(1, 2), None))
        for run in self.runs:
            run.stats.note(site, density, held_at(site), time.perf_counter() - started)
        return out

    def _site(self, sdpa: SDPA) -> Site:
        crosses, context = self._keys(sdpa)
        named = {name: span for run in self.runs for name, span in run.spans.items()} if context is not None else {}
        batch, n_keys, mask = sdpa.q.shape[0], sdpa.k.shape[2], _mask(sdpa)
        layer = self.runs[0].layers[self.module]
        return Site(
            module=self.module, layer=layer, order=layer, q=sdpa.q, new_k=sdpa.k, new_v=sdpa.v,
            scale=sdpa.q.shape[-1] ** -0.5 if sdpa.scale is None else sdpa.scale,
            attention_mask=mask, is_causal=sdpa.is_causal and mask is None, dropout=sdpa.dropout,
            hidden=_flat(self.hidden), step=self.runs[0].step,
            spans=Spans(named, None, lambda: Place(batch, 0, n_keys, sdpa.q.device)),
            own=OwnSequence() if crosses else None, context=context,
            project=None if context is None else self._project,
        )  # fmt: skip

    def _keys(self, sdpa: SDPA) -> tuple[bool, Tensor | None]:
        """Return whether the keys are another sequence's, and that sequence where it is the module's context.

        Keys of the image and the context together are the queries' own. Those of an image prompt are neither.
        """
        if not isinstance(self.context, Tensor):
            return False, None
        n_keys, n_context = sdpa.k.shape[2], self.context.shape[1]
        if n_keys == n_context and len(self.context) == len(sdpa.k):
            return True, self.context
        return n_keys not in (sdpa.q.shape[2], sdpa.q.shape[2] + n_context), None

    def _project(self, context: Float[Tensor, "c s d"]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of another context, by letting the processor run up to its attention."""
        one = self.hidden[:1, :1] if self.hidden.dim() == 3 else self.hidden[:1, :, :1, :1]
        try:
            with CatchSDPA(_stop):  # keys do not depend on the queries, so that one query will do
                self.forward(one.expand(len(context), *one.shape[1:]), encoder_hidden_states=context)
        except _Stop as stop:
            return stop.k, stop.v
        raise UnsupportedModel(f"{type(self.module).__name__} did not attend to another context")


class _Stop(Exception):
    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.k, self.v = k, v


def _stop(sdpa: SDPA, native: Callable[[], Tensor]) -> Tensor:
    raise _Stop(sdpa.k, sdpa.v)


def _mask(sdpa: SDPA) -> Tensor | None:
    """Return the mask in four axes. PyTorch aligns the first query with the first key, where `Site` aligns the last."""
    n, n_keys = sdpa.q.shape[2], sdpa.k.shape[2]
    if sdpa.is_causal and n != n_keys:
        return torch.ones(1, 1, n, n_keys, dtype=torch.bool, device=sdpa.q.device).tril()
    return None if sdpa.mask is None else sdpa.mask.reshape((1,) * (4 - sdpa.mask.dim()) + sdpa.mask.shape)


def _flat(hidden: Tensor | None) -> Tensor | None:
    """Return hidden states as tokens `(B, N, C)`; feature maps come as `(B, C, H, W)`."""
    if hidden is None or hidden.dim() == 3:
        return hidden
    return hidden.flatten(2).transpose(1, 2)
