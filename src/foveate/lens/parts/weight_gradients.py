"""Gradients of a loss with respect to attention weights, without the model's slow attention.

A head's output is `o_i = sum_j A_ij v_j`, so that the gradient of `A_ij` is the product of the output's gradient at
`i` and the value at `j`. The model's fused kernel stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host.entry import apply
from foveate.host.fused_statistics import grouped
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.parts.inputs import by_name
from foveate.lens.parts.maps import whole_map
from foveate.lens.parts.stack import Layers, Part, covering


def weight_gradients(
    model: object, inputs: Tensor | Mapping[str, Any], loss: Callable[[Any], Tensor], *, part: Part = "auto",
    **more: Any,
) -> Float[Tensor, "b l h n s"]:  # fmt: skip
    """Run a model once and return the gradient of a loss with respect to all its attention weights.

    It is zero for pairs that the model does not see, and in rows of padding.

    Args:
        model: a model in evaluation mode that reads a whole text at once.
        inputs: the model's inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
        loss: makes a number of the model's output.
        part: see `foveate.lens.Lens`.
    """
    record = _Outputs(part)
    with torch.enable_grad(), apply(model, record, on=covering(part)) as run:
        given = by_name(run.host.model, inputs)
        value = loss(run.host.model(**given, **more))
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise OptionError("loss must return one number that depends on the model's output")
    layers = sorted(record.outputs)
    slopes = torch.autograd.grad(value, [record.outputs[layer] for layer in layers], allow_unused=True)
    found = []
    for layer, slope in zip(layers, slopes, strict=True):
        seen = record.seen[layer]
        each = torch.zeros_like(seen, dtype=record.values[layer].dtype)
        if slope is not None:
            each = slope @ grouped(record.values[layer], slope.shape[1]).mT
        found.append(each.masked_fill(~seen, 0.0))
    return torch.stack(found, 1)


@final
class _Outputs(Method):
    """Record each layer's outputs in autograd's graph, its values, and the pairs that it sees."""

    def __init__(self, part: Part) -> None:
        self.stack = Layers(part)
        self.outputs: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    def bind(self, host: Host) -> None:
        self.stack.bind(host, self)

    def at(self, site: Site) -> bool:
        return self.stack.number(site) is not None

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        out = out if out.requires_grad else out.detach().requires_grad_()
        self.outputs[self.stack.at(site)] = out
        return out

    def read(self, site: Site, out: Tensor) -> None:
        layer = self.stack.at(site)
        self.seen[layer], self.values[layer] = whole_map(site) > 0, site.v.detach().clone()
