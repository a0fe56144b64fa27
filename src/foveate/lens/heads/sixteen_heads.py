"""Importance of heads by gradients, and the pruning that it orders.

Are Sixteen Heads Really Better than One? (2019), arXiv 1905.10650. Each head has a gate: 1 as it is, 0 removed. A
head's importance is the expected size of the loss's gradient with respect to its gate. Most heads can be removed
singly, some layers do with one head, and a good part of all heads can be removed in order of importance.

    importance = gradient_importance(model, batches)      # (layers, heads), from one backward pass a batch
    curve = prune_in_steps(model, importance, score)      # the score after each tenth of the heads
    small = foveate.host.cut_heads(model, curve.removed(0.2))   # a smaller copy without them

The paper takes the absolute value of a whole example's gradient, which is the default here; the authors' code takes it
position by position (`per="position"`). The code also divides the last layer by another count, which no normalised
score shows. To estimate importance again after each step is an option here; the paper sorts the heads once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.lens.circuits.interventions import Head, Scale
from foveate.lens.circuits.output_gradients import output_gradients
from foveate.lens.parts.head_table import one_stack

#: `(inputs, targets)`: the model's inputs, or its main input alone, and what `loss` compares the output with.
Batch = tuple[Tensor | Mapping[str, Any], Any]
#: `loss(output, targets)` returns a loss for each example, `(B,)`.
Loss = Callable[[Any, Any], Tensor]
#: `score(model)`: how well the model does; higher is better.
Score = Callable[[Any], float]


def gradient_importance(
    model: object,
    batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    normalize: Literal["layer", "none"] = "layer",
    per: Literal["example", "position"] = "example",
) -> Float[Tensor, "l h"]:
    """Return each head's importance `(layers, heads)`: the mean over examples of |dL/dgate|.

    The gate multiplies the head's output, so that the gradient is the sum over positions of output times its gradient.
    Costs a forward and a backward pass for each batch. Heads that a layer does not have are NaN.

    Args:
        model: a model with one stack of attention layers, in evaluation mode (dropout would add noise).
        batches: pairs of inputs and targets.
        loss: returns the loss of each example; None is `example_losses`.
        normalize: "layer" divides a layer's scores by their L2 norm, "none" keeps them.
        per: "example" takes the absolute value of an example's sum over positions, as the paper; "position" that of
            each position, as the authors' code.
    """
    validate.one_of("normalize", normalize, ("layer", "none"))
    validate.one_of("per", per, ("example", "position"))
    host = one_stack(model)
    sums, count = torch.full((host.layers, host.heads), torch.nan, dtype=torch.float64), 0
    for inputs, targets in batches:
        for layer, values in _contributions(host, inputs, targets, loss or example_losses).items():
            size = values.abs().sum(2) if per == "position" else values.sum(2).abs()
            heads = size.shape[1]
            sums[layer, :heads] = sums[layer, :heads].nan_to_num() + size.sum(0).double().cpu()
        count += len(values)
    if not count:
        raise OptionError("batches must hold at least one batch; got none")
    importance = sums / count
    if normalize == "layer":
        norm = importance.nan_to_num().square().sum(1, keepdim=True).sqrt()
        importance = importance / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return importance.float()


def _contributions(host: Host, inputs: Any, targets: Any, loss: Loss) -> dict[int, Float[Tensor, "b h n"]]:
    """Return output times gradient of each head and position, by layer: their sum is the gradient of a head's gate."""
    found = output_gradients(host, inputs, lambda output: loss(output, targets))
    batch = len(next(iter(found.outputs.values())))
    if found.value.shape != (batch,):
        raise ShapeError(f"loss must return a number for each of {batch} examples; got {shown(found.value)}")
    return {layer: (out * found.gradients[layer]).sum(-1) for layer, out in found.outputs.items()}


def example_losses(output: Any, targets: Tensor) -> Float[Tensor, " b"]:
    """Return each example's cross entropy: that of a class `(B,)`, or the mean over positions `(B, N)`.

    Args:
        output: a model's output with `logits`, `(B, classes)` or `(B, N, classes)`.
        targets: numbers of classes; -100 does not count. A language model's are the next tokens.
    """
    logits = output.logits
    if targets.shape != logits.shape[:-1]:
        raise ShapeError(
            f"targets must be {tuple(logits.shape[:-1])}, one for each of the logits; got {shown(targets)}"
        )
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)
    if targets.dim() == 1:
        return losses
    return losses.flatten(1).sum(1) / (targets != -100).flatten(1).sum(1).clamp_min(1)


def ablate_each(model: object, score: Score) -> Float[Tensor, "l h"]:
    """Return the model's score without each head, one at a time.

    `score(model) - ablate_each(model, score)` is the paper's oracle order, which costs a run of `score` for each head.
    """
    host = one_stack(model)
    return _scores(host, score, lambda mask, layer, head: mask[layer, head].zero_())


def keep_one(model: object, score: Score) -> Float[Tensor, "l h"]:
    """Return the model's score with a single head left in one layer, for each head; the other layers are whole.

    The largest number of a row says how well the layer does with its best head.
    """

    def close_others(mask: Tensor, layer: int, head: int) -> None:
        mask[layer] = 0.0
        mask[layer, head] = 1.0

    return _scores(one_stack(model), score, close_others)


def _scores(host: Host, score: Score, close: Callable[[Tensor, int, int], Any]) -> Float[Tensor, "l h"]:
    found = torch.empty(host.layers, host.heads)
    for layer in range(host.layers):
        for head in range(host.heads):
            mask = torch.ones(host.layers, host.heads)
            close(mask, layer, head)
            found[layer, head] = _scored(host, score, mask)
    return found


def _scored(host: Host, score: Score, mask: Float[Tensor, "l h"]) -> float:
    with torch.no_grad(), apply(host.model, Scale(mask)):
        return float(score(host.model))


@final
@dataclass(frozen=True, eq=False)
class PruningCurve:
    """The scores of a model while its heads are removed, the least important first.

    Args:
        counts: numbers of removed heads, from 0.
        scores: the score at each of them.
        order: heads in the order of their removal.
        heads: number of heads of the whole model.
    """

    counts: list[int]
    scores: list[float]
    order: list[Head]
    heads: int

    def removed(self, share: float) -> list[Head]:
        """Return the heads that are removed first: a share of all heads, rounded."""
        validate.between("share", share, 0.0, len(self.order) / self.heads)
        return self.order[: round(share * self.heads)]

    def prunable(self, loss: float) -> float:
        """Return the largest share of heads up to which the score never falls by more than `loss`."""
        validate.at_least("loss", loss, 0.0)
        good = [score >= self.scores[0] - loss for score in self.scores]
        last = good.index(False) - 1 if False in good else len(good) - 1
        return self.counts[last] / self.heads


def prune_in_steps(
    model: object,
    importance: Float[Tensor, "l h"] | Callable[[Any], Tensor],
    score: Score,
    *,
    step: float = 0.1,
    until: float = 1.0,
) -> PruningCurve:
    """Remove heads over all layers in order of importance, a share of them at a time, and score the model after each.

    Args:
        model: a model with one stack of attention layers; it stays as it is.
        importance: importance `(layers, heads)`, sorted once; or a function of the model that gives it, which is called
            before each step on the model as pruned so far.
        score: how well the model does.
        step: share of all heads that a step removes.
        until: share of all heads to remove.
    """
    host = one_stack(model)
    for name, value in (("step", step), ("until", until)):
        validate.between(name, value, 0.0, 1.0)
    if not step:
        raise OptionError("step=0 must be above 0")
    mask, order = torch.ones(host.layers, host.heads), list[Head]()
    table = _importance(host, importance, mask)
    total = int(table.isfinite().sum())
    counts, scores = [0], [_scored(host, score, mask)]
    while counts[-1] < round(until * total):
        count = min(max(round(len(counts) * step * total), counts[-1] + 1), round(until * total))
        if order and callable(importance):
            table = _importance(host, importance, mask)
        left = [head for head in pruning_order(table) if mask[head]]
        for head in left[: count - counts[-1]]:
            mask[head] = 0.0
            order.append(head)
        counts.append(count)
        scores.append(_scored(host, score, mask))
    return PruningCurve(counts, scores, order, total)


def _importance(host: Host, importance: Tensor | Callable[[Any], Tensor], mask: Tensor) -> Float[Tensor, "l h"]:
    if isinstance(importance, Tensor):
        table = importance
    else:
        with apply(host.model, Scale(mask)):
            table = importance(host.model)
    if tuple(table.shape) != (host.layers, host.heads):
        raise ShapeError(f"importance must be (layers, heads)={(host.layers, host.heads)}; got {shown(table)}")
    return table


def pruning_order(importance: Float[Tensor, "l h"]) -> list[Head]:
    """Return the heads from the least to the most important over all layers; NaN stands for no head."""
    ranked = importance.flatten().argsort(stable=True).tolist()
    width = importance.shape[1]
    return [divmod(number, width) for number in ranked if bool(importance.flatten()[number].isfinite())]
