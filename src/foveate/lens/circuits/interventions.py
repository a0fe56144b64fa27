"""Interventions on the outputs of heads, and their record: the parts of every causal study.

    outputs = head_outputs(model, corrupted_ids)                         # {layer: (B, heads, N, Dv)}
    with foveate.apply(model, Patch({(3, 1): outputs[3][:, 1]})):        # that head works as on the other text
        model(ids)
    with foveate.apply(model, ablate([(3, 1), (5, 0)])):                 # two heads give nothing
        model.generate(ids)

All act on a head's output before the output projection, so that the model's fused kernel stays. Layers are numbered as
in `foveate.look`, and `part` chooses one of the stacks of an encoder-decoder as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.parts.stack import Layers, Part, Stack, covering

#: A head of a model: its layer and its number in the layer.
Head = tuple[int, int]


@final
@dataclass(eq=False)
class Scale(Method):
    """Multiply the output of each head by a factor: 0 removes a head, 1 leaves it as it is.

    Gradients of the factors are the importance of the heads at first order.

    Args:
        factors: `(layers, heads)`, in the order of the model's layers.
        part: see `foveate.lens.Lens`.
    """

    factors: Float[Tensor, "l h"]
    part: Part = "auto"
    _stack: Layers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._stack = Layers(self.part)
        if not isinstance(self.factors, Tensor) or self.factors.ndim != 2:
            raise ShapeError("factors must be a tensor (layers, heads)")

    def bind(self, host: Host) -> None:
        stack = self._stack.bind(host, self)
        if tuple(self.factors.shape) != (stack.layers, stack.heads):
            raise ShapeError(f"factors must be (layers, heads)={(stack.layers, stack.heads)}; got "
                             f"{tuple(self.factors.shape)}")  # fmt: skip

    def at(self, site: Site) -> bool:
        layer = self._stack.number(site)
        if layer is None:
            return False
        row = self.factors[layer]
        return row.requires_grad or bool((row != 1.0).any())

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return out * self.factors[self._stack.at(site), : out.shape[1]].to(out)[None, :, None, None]


@final
@dataclass(eq=False)
class Patch(Method):
    """Replace the outputs of some heads by given ones.

    Args:
        outputs: for each head its new outputs: `(Dv,)` for all tokens, or `(B or 1, N, Dv)` for the tokens of a
            sequence by position, padding included; tokens past N keep their own.
        positions: the tokens whose outputs are replaced; negative ones count from the end of the call. None for all.
        part: see `foveate.lens.Lens`.
    """

    outputs: Mapping[Head, Float[Tensor, "..."]]
    positions: Iterable[int] | None = None
    part: Part = "auto"
    _layers: set[int] = field(init=False, repr=False)
    _stack: Layers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._stack = Layers(self.part)
        if not isinstance(self.outputs, Mapping):
            raise OptionError("outputs must be a mapping {(layer, head): tensor}")
        self._layers = {layer for layer, _ in checked_heads(self.outputs)}
        for head, value in self.outputs.items():
            if value.ndim not in (1, 3):
                raise ShapeError(f"outputs: that of head {head} must be (Dv,) or (B, N, Dv); got {tuple(value.shape)}")
        self.positions = None if self.positions is None else tuple(self.positions)

    def bind(self, host: Host) -> None:
        stack = self._stack.bind(host, self)
        check_in_stack(self.outputs, stack)

    def at(self, site: Site) -> bool:
        return self._stack.number(site) in self._layers

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        changed, places, number = out.clone(), self._places(site), self._stack.at(site)
        for (layer, head), value in self.outputs.items():
            if layer != number:
                continue
            own = places if value.ndim == 1 else places[places < value.shape[1]]
            rows = own - int(site.query_positions[0])
            changed[:, head, rows] = (value if value.ndim == 1 else value[:, own]).to(out)
        return changed

    def _places(self, site: Site) -> Tensor:
        places = site.query_positions
        if self.positions is None:
            return places
        chosen = torch.tensor([p + site.asked if p < 0 else p for p in self.positions], device=places.device)
        return places[torch.isin(places, chosen)]


@final
@dataclass(eq=False)
class HeadOutputs(Method):
    """Record the outputs of heads, before the output projection. The model's results stay as they are.

    Args:
        layers: numbers of the layers; None for all.
        keep_graph: True keeps the outputs in autograd's graph, for gradients with respect to them.
        part: see `foveate.lens.Lens`.

    `found` has the latest sequence's outputs `(B, heads, N, Dv)` by layer; calls on one cache are joined.
    """

    layers: Iterable[int] | None = None
    keep_graph: bool = False
    part: Part = "auto"
    found: dict[int, Tensor] = field(default_factory=dict, init=False)
    _stack: Layers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._stack = Layers(self.part)
        self.layers = None if self.layers is None else tuple(self.layers)

    def bind(self, host: Host) -> None:
        stack = self._stack.bind(host, self)
        check_in_stack([(layer, 0) for layer in self.layers or ()], stack)

    def at(self, site: Site) -> bool:
        layer = self._stack.number(site)
        return layer is not None and (self.layers is None or layer in self.layers)

    def read(self, site: Site, out: Tensor) -> None:
        notes, new = site.notes(self), out if self.keep_graph else out.detach().clone()
        past = notes.get("outputs")
        notes["outputs"] = new if past is None else torch.cat([past, new], 2)
        self.found[self._stack.at(site)] = notes["outputs"]


def ablate(heads: Iterable[Head], means: Mapping[int, Float[Tensor, "h dv"]] | None = None, **options: Any) -> Patch:
    """Return the patch that removes heads: their outputs become zero, or their mean over a data set.

    Args:
        heads: pairs of layer and head.
        means: the mean outputs by layer, see `head_means`; None for zero.
        options: arguments of `Patch`.
    """
    zero = torch.zeros(1)
    return Patch({(l, h): zero if means is None else means[l][h] for l, h in checked_heads(heads)}, **options)  # noqa: E741


def head_outputs(
    model: object, inputs: Tensor | Mapping[str, Any], *, part: Part = "auto", **more: Any
) -> dict[int, Float[Tensor, "b h n dv"]]:
    """Run a model once and return its heads' outputs before the output projection, by layer.

    Args:
        model: a model.
        inputs: its inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
        part: see `foveate.lens.Lens`.
    """
    record = HeadOutputs(part=part)
    with torch.no_grad(), apply(model, record, on=covering(part)) as run:
        given = {run.host.model.main_input_name: inputs} if isinstance(inputs, Tensor) else dict(inputs)
        run.host.model(**given, **more)
    return record.found


def head_means(
    model: object, data: Iterable[Tensor | Mapping[str, Any]], part: Part = "auto"
) -> dict[int, Float[Tensor, "h dv"]]:
    """Return the mean output of each head over all tokens of a data set, by layer."""
    sums: dict[int, Tensor] = {}
    count = 0
    for inputs in data:
        found = head_outputs(model, inputs, part=part)
        count += next(iter(found.values())).shape[0] * next(iter(found.values())).shape[2]
        for layer, out in found.items():
            sums[layer] = sums.get(layer, 0.0) + out.double().sum((0, 2))
    if not count:
        raise OptionError("data must hold at least one input; got none")
    return {layer: (total / count).float() for layer, total in sums.items()}


def checked_heads(heads: Iterable[Head]) -> list[Head]:
    """Return heads as a list; refuse what is no pair of whole numbers."""
    listed = list(heads)
    for head in listed:
        if not (isinstance(head, tuple) and len(head) == 2 and all(type(number) is int for number in head)):
            raise OptionError(f"heads must be pairs (layer, head); got {head!r}")
    return listed


def check_in_model(heads: Iterable[Head], host: Host) -> None:
    """Refuse heads that a model with one stack of layers does not have."""
    check_in_stack(heads, Stack.of(host))


def check_in_stack(heads: Iterable[Head], stack: Stack) -> None:
    """Refuse heads that a part of a model does not have."""
    for layer, head in heads:
        if layer not in range(stack.layers) or head not in range(stack.heads):
            raise OptionError(
                f"head {(layer, head)} is not in this model, which has layers 0..{stack.layers - 1} and heads "
                f"0..{stack.heads - 1}"
            )
