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
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.parts.inputs import by_name
from foveate.lens.parts.stack import Layers, Part, covering

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
        check_outputs(self.outputs)
        self.positions = None if self.positions is None else tuple(self.positions)

    def bind(self, host: Host) -> None:
        self._stack.bind(host, self).check_heads(self.outputs)

    def at(self, site: Site) -> bool:
        return self._stack.number(site) in self._layers

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        changed, number = out.clone(), self._stack.at(site)
        for (layer, head), value in self.outputs.items():
            if layer == number:
                changed[:, head] = replaced(out[:, head], value, site.query_positions, site.asked, self.positions)
        return changed


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
        self._stack.bind(host, self).check_heads([(layer, 0) for layer in self.layers or ()])

    def at(self, site: Site) -> bool:
        layer = self._stack.number(site)
        return layer is not None and (self.layers is None or layer in self.layers)

    def read(self, site: Site, out: Tensor) -> None:
        notes, new = site.notes(self), out if self.keep_graph else out.detach().clone()
        past = notes.get("outputs")
        notes["outputs"] = new if past is None else torch.cat([past, new], 2)
        self.found[self._stack.at(site)] = notes["outputs"]


def ablate(
    heads: Iterable[Head], means: Mapping[int, Float[Tensor, "h dv"]] | None = None,
    outputs: Mapping[int, Float[Tensor, "b h n dv"]] | None = None, **options: Any,
) -> Patch:  # fmt: skip
    """Return the patch that removes heads: their outputs become zero, their mean over a data set, or another text's.

    Args:
        heads: pairs of layer and head.
        means: the mean outputs by layer, see `head_means`.
        outputs: the outputs on another text by layer, see `head_outputs` (resample ablation). None, as `means` is, for
            zero.
        options: arguments of `Patch`.
    """
    return Patch({head: substitute(head, means, outputs) for head in checked_heads(heads)}, **options)


def substitute(
    head: Head,
    means: Mapping[int, Float[Tensor, "h dv"]] | None,
    outputs: Mapping[int, Float[Tensor, "b h n dv"]] | None,
) -> Float[Tensor, "..."]:
    """Return what stands for a removed head's output: zero, its mean, or its output on another text."""
    if means is not None and outputs is not None:
        raise OptionError("means and outputs are both given; give one of them, or none for zero")
    (layer, number), given = head, outputs if means is None else means
    if given is None:
        return torch.zeros(1)
    if layer not in given:
        raise OptionError(f"head {layer}.{number} must be in a layer whose outputs are given: {sorted(given)}")
    return given[layer][number] if outputs is None else given[layer][:, number]


def check_outputs(outputs: Mapping[Any, Tensor]) -> None:
    """Refuse new outputs of heads that are of neither form: one for all tokens, or one for each."""
    for head, value in outputs.items():
        if value.ndim not in (1, 3):
            raise ShapeError(f"outputs: that of head {head} must be (Dv,) or (B, N, Dv); got {tuple(value.shape)}")


def replaced(
    own: Float[Tensor, "b n dv"], value: Float[Tensor, "..."], places: Int[Tensor, " n"], seen: int,
    positions: Iterable[int] | None,
) -> Float[Tensor, "b n dv"]:  # fmt: skip
    """Return a head's output with new values at some tokens.

    Args:
        own: the outputs of the tokens of a call.
        value: the new ones, see `Patch`.
        places: the positions of these tokens in the sequence.
        seen: tokens of the sequence so far.
        positions: the tokens that change, see `Patch`.
    """
    changes = torch.ones_like(places, dtype=torch.bool)
    if positions is not None:
        chosen = [place + seen if place < 0 else place for place in positions]
        changes = torch.isin(places, torch.tensor(chosen, dtype=places.dtype, device=places.device))
    if value.ndim == 3:
        changes = changes & (places < value.shape[1])
    new = own.clone()
    new[:, changes] = (value if value.ndim == 1 else value[:, places[changes]]).to(own)
    return new


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
        run.host.model(**by_name(run.host.model, inputs), **more)
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
