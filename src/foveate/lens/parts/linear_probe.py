"""A logistic probe on frozen states, and the parts of its cross-validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError


@final
@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression on standardised features.

    Args:
        weight, bias: of the classes, `(C, D)` and `(C,)`.
        mean, scale: of the training features, `(D,)`.
    """

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]

    @classmethod
    def fit(
        cls, states: Float[Tensor, "n d"], labels: Int[Tensor, " n"], penalty: float = 1.0, steps: int = 100
    ) -> Self:
        """Minimise the sum of cross-entropies plus `penalty / 2` times the squared weights; biases are free.

        Args:
            states: the training samples.
            labels: their classes, from 0 on.
            penalty: of the squared weights.
            steps: the most steps of L-BFGS.
        """
        validate.at_least("penalty", penalty, 0.0)
        x = states.detach().double()
        mean, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        x = (x - mean) / scale
        classes = int(labels.max()) + 1
        weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
        bias = x.new_zeros(classes).requires_grad_()
        search = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            loss = F.cross_entropy(x @ weight.mT + bias, labels, reduction="sum") + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            search.step(closure)  # type: ignore[no-untyped-call, arg-type, unused-ignore]
        return cls(weight.detach(), bias.detach(), mean, scale)

    def predict(self, states: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """Return the most probable class of each sample."""
        return ((states.double() - self.mean) / self.scale @ self.weight.mT + self.bias).argmax(-1)


def folds(labels: Int[Tensor, " n"], parts: int, seed: int = 0) -> Int[Tensor, " n"]:
    """Return the part of each sample, drawn so that each class is spread evenly over all parts."""
    validate.count("parts", parts, 2)
    if not len(labels) or int(labels.min()) < 0:
        raise OptionError("labels must be numbers from 0 on, at least one")
    counts = torch.bincount(labels)
    if int((counts > 0).sum()) < 2 or int(counts[counts > 0].min()) < parts:
        raise OptionError(f"labels must have two classes or more, each with at least parts={parts} samples")
    draw, found = torch.Generator().manual_seed(seed), torch.empty_like(labels)
    for each in labels.unique():
        places = (labels == each).nonzero()[:, 0]
        order = torch.randperm(len(places), generator=draw).to(places.device)
        found[places[order]] = torch.arange(len(places), device=places.device) % parts
    return found
