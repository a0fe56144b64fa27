"""The residual stream as heads read it and write to it, at all tokens: the wiring of a decoder, and second readings.

A head reads the stream through the norms in front of its attention, and writes its part of the output projection to it.
`wiring` finds the modules on these ways once for a model. `Reading` is one call of an attention module; it can be
repeated on another stream, which gives the queries, keys and values that the heads would have had.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.hooks import Hook
from foveate.host.hf.model import Host
from foveate.host.hf.taking import arguments_of, hidden_name, mapped, take_inputs
from foveate.host.method import Method
from foveate.host.output_projection import output_projection, projection_parts
from foveate.host.probing import cached
from foveate.lens.circuits.direct_effects import FrozenNorm, residual_parts
from foveate.lens.circuits.head_inputs import Input
from foveate.lens.circuits.residual_stream import Block, Step, first_tensor, trace, wide


@dataclass(frozen=True, eq=False)
class LayerWiring:
    """The modules between the residual stream and the heads of one block.

    Args:
        block: the block; its input is the stream.
        before: the norms between the stream and attention, in order.
        attention: the attention module.
        heads: number of heads.
        after: the norms between attention and the stream, in order; mostly none.
    """

    block: nn.Module
    before: tuple[nn.Module, ...]
    attention: nn.Module
    heads: int
    after: tuple[nn.Module, ...]

    @property
    def projection(self) -> nn.Module:
        """The output projection."""
        return output_projection(self.attention)

    def written(
        self, z: Float[Tensor, "b n h dv"], norms: Sequence[FrozenNorm] = (), heads: slice | list[int] = slice(None)
    ) -> Float[Tensor, "b n h c"]:
        """Return what outputs of some heads add to the stream, without biases; `norms` are `after` in the run."""
        weight = projection_parts(self.attention, self.heads)[0][heads]
        found = torch.einsum("bnhd,hdc->bnhc", wide(z), wide(weight)).flatten(0, 1)
        for norm in norms:
            found = norm.linear(found)
        return found.unflatten(0, z.shape[:2])


@dataclass(frozen=True, eq=False)
class Wiring:
    """The wiring of a decoder: its blocks, and the module that reads the stream behind the last of them."""

    layers: tuple[LayerWiring, ...]
    final: nn.Module


def wiring(run: Host) -> Wiring:
    """Return the wiring of a decoder with a language-model head; it takes a pass over two tokens.

    Raises:
        UnsupportedModel: the parts of the model do not sum to its residual stream, or something else than norms stands
            between the stream and attention.
    """
    return cached(run, "wiring", lambda: _wiring(run))


def _wiring(run: Host) -> Wiring:
    found = trace(run.model, torch.ones(1, 2, dtype=torch.long, device=run.model.device))
    residual_parts(found)  # refuses a model whose heads do not sum to the stream
    last = found.final[0].module if found.final else found.unembedding.module
    return Wiring(tuple(_layer(block) for block in found.blocks), last)


def _layer(block: Block) -> LayerWiring:
    if block.before is None:
        raise UnsupportedModel(
            f"{type(block.module).__name__} changes the residual stream before attention by more than norms"
        )
    before, after = (tuple(step.module for step in steps) for steps in (block.before, block.after))
    return LayerWiring(block.module, before, block.attention.module, block.heads.shape[1], after)


@dataclass(frozen=True, eq=False)
class Reading:
    """A call of an attention module, which can be repeated on another residual stream.

    Args:
        layer: the modules.
        stream: the stream in front of the block.
        arguments: those of the attention module's call, by name.
    """

    layer: LayerWiring
    stream: Float[Tensor, "b n c"]
    arguments: Mapping[str, Any]

    def inputs(self, streams: Float[Tensor, "g b n c"]) -> dict[Input, Float[Tensor, "g b h n d"]]:
        """Return the queries, keys and values that heads make of other streams, norms computed anew."""
        hidden = streams.flatten(0, 1).to(self.stream.dtype)
        for norm in self.layer.before:
            hidden = norm(hidden)
        return self.of_hidden(hidden.unflatten(0, streams.shape[:2]))

    def of_hidden(self, hidden: Float[Tensor, "g b n c"]) -> dict[Input, Float[Tensor, "g b h n d"]]:
        """Return the same for hidden states behind these norms."""
        groups, batch = hidden.shape[:2]

        def repeat(x: Tensor) -> Tensor:
            return x.repeat(groups, *[1] * (x.ndim - 1)) if x.ndim > 1 and 1 < len(x) == batch else x

        repeated = mapped(self.arguments, repeat)
        found = take_inputs(self.layer.attention, repeated, hidden.flatten(0, 1).to(self.stream.dtype))
        names: tuple[Input, ...] = ("q", "k", "v")
        return {name: x.unflatten(0, (groups, batch)) for name, x in zip(names, found, strict=True)}

    def at(self, text: int, token: int) -> Reading:
        """Return the call for one token of one text, as far as its arguments say its position."""
        batch, n = self.stream.shape[:2]

        def pick(x: Tensor) -> Tensor:
            if x.ndim == 1:
                return x[token : token + 1] if len(x) == n else x
            x = x[text : text + 1] if len(x) == batch else x
            return x[:, token : token + 1] if x.shape[1] == n else x

        return Reading(self.layer, self.stream[text : text + 1, token : token + 1], mapped(self.arguments, pick))


class _Pass(threading.local):
    """The findings in one thread's forward pass, by layer: readings, outputs of heads, and norms behind attention."""

    def __init__(self) -> None:
        self.streams: dict[int, Tensor] = {}
        self.readings: dict[int, Reading] = {}
        self.outputs: dict[int, Float[Tensor, "b n h dv"]] = {}
        self.norms: dict[int, list[FrozenNorm]] = {}
        self.is_probing = False


class StreamReads(Method):
    """Record what some layers read of the residual stream, and what the heads of others write to it.

    The model's results stay as they are. What is found lies in `here`, by thread, until the next pass.

    Args:
        readers: layers whose readings are recorded.
        writers: layers whose heads' outputs are recorded.
    """

    def __init__(self, readers: Sequence[int] = (), writers: Sequence[int] = ()) -> None:
        self.readers, self.writers = frozenset(readers), frozenset(writers)
        self.here = _Pass()
        self.wiring: Wiring | None = None

    def bind(self, host: Host) -> None:
        self.wiring = wiring(host)

    def layer(self, number: int) -> LayerWiring:
        """Return the modules of a layer."""
        assert self.wiring is not None  # the run has bound it
        return self.wiring.layers[number]

    def hooks(self, host: Host) -> Iterator[RemovableHandle]:
        for number in sorted(self.readers):
            layer = self.layer(number)
            yield layer.block.register_forward_pre_hook(Hook(partial(self._entered, number)), with_kwargs=True)
            yield layer.attention.register_forward_pre_hook(Hook(partial(self._called, number)), with_kwargs=True)
        for number in sorted(self.writers):
            layer = self.layer(number)
            yield layer.projection.register_forward_pre_hook(Hook(partial(self._wrote, number)))
            for norm in layer.after:
                yield norm.register_forward_hook(Hook(partial(self._normed, number)))

    def written(self, number: int) -> Float[Tensor, "b n h c"]:
        """Return what each head of a layer adds to the residual stream."""
        return self.layer(number).written(self.here.outputs[number], self.here.norms.get(number, ()))

    def _entered(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = first_tensor((*args, *kwargs.values()))
        assert stream is not None  # the traced run had one
        self.here.streams[number] = stream.detach()

    def _called(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream, arguments = self.here.streams[number], arguments_of(module, args, kwargs)
        arguments[hidden_name(arguments)] = None
        self.here.readings[number] = Reading(self.layer(number), stream, arguments)

    def _wrote(self, number: int, projection: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].ndim != 3:
            raise UnsupportedModel(f"{type(projection).__name__} must get the outputs of heads as (B, N, heads * Dv)")
        self.here.outputs[number] = args[0].detach().unflatten(-1, (self.layer(number).heads, -1))
        self.here.norms[number] = []

    def _normed(self, number: int, norm: nn.Module, args: tuple[Any, ...], made: Tensor) -> None:
        if self.here.is_probing:
            return
        self.here.is_probing = True
        try:
            step = Step(norm, args[0].detach().flatten(0, 1), made.detach().flatten(0, 1))
            self.here.norms[number].append(FrozenNorm.of(step))
        finally:
            self.here.is_probing = False
