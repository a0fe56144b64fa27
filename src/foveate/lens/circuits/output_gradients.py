"""The outputs of heads, and the gradients of a number with respect to them: one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.lens.circuits.interventions import HeadOutputs, Scale
from foveate.lens.circuits.residual_stream import Inputs, as_mapping


@dataclass(frozen=True, eq=False)
class OutputGradients:
    """The outputs of all heads before the output projection, and a number's gradients, both by layer.

    Args:
        outputs, gradients: `(B, heads, N, Dv)` by layer.
        value: what the objective returned.
        more: the gradients with respect to the other tensors that were asked for.
    """

    outputs: dict[int, Float[Tensor, "b h n dv"]]
    gradients: dict[int, Float[Tensor, "b h n dv"]]
    value: Tensor
    more: tuple[Tensor, ...] = ()


def output_gradients(
    run: Host, inputs: Inputs, objective: Callable[[Any], Tensor], *methods: Method,
    others: Callable[[], Sequence[Tensor]] = tuple, **options: Any,
) -> OutputGradients:  # fmt: skip
    """Run a model forwards and backwards.

    Gates of 1 give the outputs a graph, also in a model whose weights want no gradient.

    Args:
        run: the model.
        inputs: its inputs.
        objective: returns a tensor, given the model's output; the gradients are those of its sum.
        methods: further methods of the run.
        others: returns more tensors of the forward pass to take gradients of.
        options: further arguments of the model.
    """
    record = HeadOutputs(keep_graph=True)
    gates = torch.ones(run.layers, run.heads, requires_grad=True)
    with torch.enable_grad(), apply(run.model, Scale(gates), *methods, record):
        value = objective(run.model(**as_mapping(run, inputs), **options))
    outputs, more = list(record.found.values()), list(others())
    found = torch.autograd.grad(value.sum(), [*outputs, *more], allow_unused=True, materialize_grads=True)
    of_heads = dict(zip(record.found, found, strict=False))
    plain = {layer: out.detach() for layer, out in record.found.items()}
    return OutputGradients(plain, of_heads, value.detach(), tuple(found[len(outputs) :]))
