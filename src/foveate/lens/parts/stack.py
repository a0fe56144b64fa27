"""The stacks of attention layers of a model: its decoder, its encoder, or the decoder's attention to the encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar, final
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import UnsupportedModel
from foveate.host.diffusers.model import DiffusionHost, heads_of
from foveate.host.hf.calls import CROSS, parameters
from foveate.host.hf.model import Host, check_heads
from foveate.host.method import Method
from foveate.host.site import Site

T = TypeVar("T")

#: A part of a model: "decoder" and "encoder" are self-attention, "cross" is the decoder's attention to another
#: sequence. "auto" is the language part of a model that has one stack, and is refused for an encoder-decoder. In a
#: diffusion model, "cross" is its attention to the prompt, and "auto" all other attention.
Part = Literal["auto", "decoder", "encoder", "cross"]
PARTS: tuple[Part, ...] = ("auto", "decoder", "encoder", "cross")


@final
@dataclass(frozen=True, eq=False)
class Stack:
    """The attention layers of one part of a model.

    Args:
        numbers: each attention module with its layer number. In a decoder with cross attention, two modules of a layer
            have the same number.
        layers: number of layers.
        heads: query heads of a layer.
        outside: whether the part lies outside the decoder of the model.
    """

    numbers: dict[nn.Module, int]
    layers: int
    heads: int
    outside: bool

    @classmethod
    def of(cls, host: Host | DiffusionHost, part: Part = "auto") -> Self:
        """Return a part of a model.

        Raises:
            UnsupportedModel: the model has no such part, or several of them.
        """
        validate.one_of("part", part, PARTS)
        name = type(host.model).__name__
        if isinstance(host, DiffusionHost):
            return cls._of_diffusion(host, part, name)
        decoder = host.decoder
        both = host.model.config.is_encoder_decoder and decoder is not None
        if part == "auto" and both:
            raise UnsupportedModel(
                f'{name} has more than a single stack of attention layers: choose part="encoder", "decoder" or "cross"'
            )
        modules = _modules(host, part)
        _check(modules, part, name)
        numbers = {module: _number(module, place) for place, module in enumerate(modules)}
        count = max(numbers.values(), default=-1) + 1
        is_text = modules[0].config is host.config and not both
        outside = part == "encoder" and decoder is not None
        return cls(numbers, max(count, host.layers) if is_text else count, _heads(host, modules, part), outside)

    @classmethod
    def _of_diffusion(cls, host: DiffusionHost, part: Part, name: str) -> Self:
        modules = host.part(part == "cross") if part in ("auto", "cross") else []
        if not modules:
            raise UnsupportedModel(f"part={part!r}: {name} has none")
        numbers = {module: place for place, module in enumerate(modules)}
        return cls(numbers, len(modules), max(map(heads_of, modules)), outside=False)

    def check_heads(self, heads: Iterable[tuple[int, int]]) -> None:
        """Refuse a pair of layer and query head that the part does not have."""
        check_heads(heads, self.layers, self.heads)


@final
class Layers:
    """The layers on which a method acts, of every model to which it is applied.

    Args:
        part: the part of the models.
    """

    def __init__(self, part: Part) -> None:
        validate.one_of("part", part, PARTS)
        self.part = part
        self._numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def bind(self, host: Host, method: Method) -> Stack:
        """Add the layers of a model to which `method` is applied, and return its part."""
        stack = Stack.of(host, self.part)
        self._numbers.update(stack.numbers)
        method.needs_all = stack.outside
        return stack

    def number(self, site: Site) -> int | None:
        """Return the layer number of a call; None if it does not belong to the part."""
        return self._numbers.get(site.module) if site.crosses == (self.part == "cross") else None

    def at(self, site: Site) -> int:
        """Return the layer number of a call that belongs to the part."""
        return self._numbers[site.module]


class ByLayer(Method, ABC, Generic[T]):
    """A method that records something of each layer of a part, once; subclasses define `record`.

    Args:
        part: the part of the model.

    Attributes:
        found: what was recorded, by layer number.
    """

    def __init__(self, part: Part) -> None:
        self.layers, self.found = Layers(part), dict[int, T]()

    @abstractmethod
    def record(self, site: Site) -> T:
        """Return what to record of a layer's call."""

    def bind(self, host: Host) -> None:
        self.layers.bind(host, self)

    def at(self, site: Site) -> bool:
        return self.layers.number(site) is not None

    def read(self, site: Site, out: Tensor) -> None:
        layer = self.layers.at(site)
        if layer in self.found:
            raise UnsupportedModel(f"layer {layer} attends more than once in a pass, which cannot be read as one map")
        self.found[layer] = self.record(site)


def covering(part: Part) -> Literal["auto", "all"]:
    """Return the `on` of a `foveate.apply` that covers a part."""
    return "all" if part == "encoder" else "auto"


def _modules(host: Host, part: Part) -> list[nn.Module]:
    """Return the attention modules of a part, those of the configuration that describes it."""
    every, decoder = host.attention_modules(), host.decoder
    inside = set() if decoder is None else set(decoder.modules())
    if part == "encoder" and decoder is not None:
        return [module for module in every if module not in inside]
    if decoder is None:
        if part in ("decoder", "cross"):
            return []
        inside = set(every)
    some = [module for module in every if module in inside]
    some = [module for module in some if module.config is host.config] or some
    return some if part != "cross" or any(_may_cross(module) for module in some) else []


def _number(module: nn.Module, place: int) -> int:
    """Return a module's layer number: its own, or else its place in the stack."""
    own = getattr(module, "layer_idx", None)
    return own if isinstance(own, int) else place


def _check(modules: list[nn.Module], part: Part, name: str) -> None:
    """Refuse an absent part, several encoders, and layers with several modules of self-attention."""
    if not modules:
        raise UnsupportedModel(f"part={part!r}: {name} has none")
    layers: dict[object, list[nn.Module]] = {}
    for module in modules:
        layers.setdefault(getattr(module, "layer_idx", None), []).append(module)
    encoders = {id(module.config) for module in modules} if part == "encoder" else set()
    for number, some in layers.items():
        allowed = 1 + (part != "encoder" and any(_may_cross(module) for module in some))
        if len(encoders) > 1 or (number is not None and len(some) > allowed):
            raise UnsupportedModel(
                f"{name} has several attention modules per layer; give one of its parts with a single stack alone"
            )


def _may_cross(module: nn.Module) -> bool:
    """Return whether a module may attend to another sequence."""
    return not {*CROSS}.isdisjoint(parameters(type(module).forward))


def _heads(host: Host, modules: list[nn.Module], part: Part) -> int:
    """Return the number of query heads that a part's configuration names."""
    encodes = part == "encoder" or host.decoder is None
    for name in ("encoder_attention_heads" if encodes else "decoder_attention_heads", "num_attention_heads"):
        count = getattr(modules[0].config, name, None)
        if isinstance(count, int):
            return count
    return host.heads
