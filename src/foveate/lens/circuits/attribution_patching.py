"""Attribution patching: the effects of all patches of heads, and of all edges, from one forward and one backward pass.

    sent = head_outputs(model, corrupt)                       # or means, or zeros
    heads = attribute_heads(model, clean, sent, metric)       # heads.table (layers, heads)
    edges = attribute_edges(model, clean, sent, metric)       # edges.top(20): edges with their estimates

The estimate of a patch is the gradient of the metric with respect to what is patched, times its change. Attribution
Patching Outperforms Automated Circuit Discovery (2023), arXiv 2310.10348, does so for edges; the method for heads is
Neel Nanda's (2023). It is exact where the metric is linear in the patch. A metric that is at its optimum on the clean
texts, such as a KL divergence from them, has no gradient there: take a difference of logits.

AtP*: An efficient and scalable method for localizing LLM behaviour to components (2024), arXiv 2403.00745, names two
causes of missed effects. A softmax that is saturated has almost no gradient: `exact_heads=True` computes the receiving
head with its changed query, key or value, and takes only what comes after it as linear. Effects through different
layers that cancel each other are met by `drop_layers=True` of `attribute_heads`: the mean size of the estimates with
one layer's gradient left out at a time.

Signs follow the paper: positive if the patch raises the metric. The authors' release subtracts the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host.hf.hooks import Hook
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.lens.circuits.interventions import Head
from foveate.lens.circuits.output_gradients import OutputGradients, output_gradients
from foveate.lens.circuits.patching import Metric
from foveate.lens.circuits.residual_stream import Inputs, trace
from foveate.lens.parts.head_table import one_stack


@final
@dataclass(frozen=True, eq=False)
class HeadAttributions:
    """The estimated effects of patching single heads.

    Args:
        by_token: the estimate for each head and token, summed over texts.
        value: the metric on the clean texts.
    """

    by_token: Float[Tensor, "l h n"]
    value: float

    @property
    def table(self) -> Float[Tensor, "l h"]:
        """The estimate for each head at all tokens together."""
        return self.by_token.sum(-1)

    def top(self, count: int) -> list[Head]:
        """Return the heads with the largest estimates in size, the largest first."""
        validate.count("count", count, 1)
        order = self.table.abs().flatten().argsort(descending=True, stable=True)[:count]
        return [divmod(number, self.table.shape[1]) for number in order.tolist()]


def attribute_heads(
    model: object, clean: Inputs, outputs: Mapping[int, Tensor], metric: Metric, *, drop_layers: bool = False
) -> HeadAttributions:
    """Return the estimated change of a metric if one head at a time has another output.

    Args:
        model: a model with logits and one stack of layers, in evaluation mode.
        clean: texts.
        outputs: the other outputs by layer: `(B, heads, N, Dv)` of other texts (`head_outputs`), or `(heads, Dv)` for
            all tokens (`head_means`).
        metric: a number of the logits.
        drop_layers: AtP*'s GradDrop. Estimates are then sizes; it takes a backward pass for each layer.
    """
    validate.flag("drop_layers", drop_layers)
    run = one_stack(model)
    if drop_layers and run.layers < 2:
        raise OptionError("drop_layers=True must have a model with at least two layers")
    drops = _LayerDrop() if drop_layers else None
    tables, value, count = torch.zeros(0), 0.0, run.layers if drop_layers else 1
    for number in range(count):
        if drops is not None:
            drops.layer = number
        found = output_gradients(
            run, clean, lambda output: metric(output.logits), *(() if drops is None else (drops,)), use_cache=False
        )
        part = _by_token(found, outputs, run)
        tables = part if drops is None else (tables if number else torch.zeros_like(part)) + part.abs()
        value = float(found.value)
    return HeadAttributions(tables / max(1, count - 1), value)


def other_outputs(found: Mapping[int, Tensor], outputs: Mapping[int, Tensor]) -> dict[int, Float[Tensor, "b h n dv"]]:
    """Return other outputs in the form of those of a run; refuse what does not fit them."""
    if missing := found.keys() - outputs.keys():
        raise OptionError(f"outputs must hold all layers; {sorted(missing)} are missing")
    other = {}
    for layer, own in found.items():
        value = outputs[layer] if outputs[layer].ndim == 4 else outputs[layer][:, None]
        try:
            other[layer] = value.to(own).expand_as(own)
        except RuntimeError:
            raise OptionError(
                f"outputs: those of layer {layer} must be {tuple(own.shape)} or (heads, Dv); got "
                f"{tuple(outputs[layer].shape)}"
            ) from None
    return other


def _by_token(found: OutputGradients, outputs: Mapping[int, Tensor], run: Host) -> Float[Tensor, "l h n"]:
    other = other_outputs(found.outputs, outputs)
    n = next(iter(other.values())).shape[2]
    table = torch.zeros(run.layers, run.heads, n, dtype=torch.float64)
    for layer, own in found.outputs.items():
        change = (other[layer] - own) * found.gradients[layer]
        table[layer, : own.shape[1]] = change.double().sum((0, 3)).cpu()
    return table


class _LayerDrop(Method):
    """Let no gradient pass through the branches of one layer; the residual stream carries it on."""

    def __init__(self) -> None:
        self.layer = 0
        self.ends: list[tuple[int, nn.Module]] = []

    def bind(self, host: Host) -> None:
        found = trace(host.model, torch.ones(1, 2, dtype=torch.long, device=host.model.device))
        for number, block in enumerate(found.blocks):
            steps = [block.after[-1] if block.after else block.attention, *block.others]
            self.ends += [(number, step.module) for step in steps]

    def hooks(self, host: Host) -> Iterator[RemovableHandle]:
        for number, module in self.ends:
            yield module.register_forward_hook(Hook(self._stop(number)))

    def _stop(self, number: int) -> Any:
        def hook(module: nn.Module, args: object, made: Any) -> Any:
            if number != self.layer:
                return made
            return made.detach() if isinstance(made, Tensor) else (made[0].detach(), *made[1:])

        return hook
