"""Distillation of attention weights, and measures of how similar two attentions are.

It works with every operator that has a weight matrix. Hedgehog (arXiv 2402.04347) trains the feature maps of linear
attention with it to imitate softmax attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.ops.dense.softmax import Softmax
from foveate.ops.operator import Operator
from foveate.train.base.objective import Batch, Loss, Objective


def distillation_loss(student: Float[Tensor, "b h q k"], teacher: Float[Tensor, "b h q k"]) -> Float[Tensor, ""]:
    """Return the soft cross entropy `-sum_j teacher_ij log student_ij`: mean over rows that see a key, sum over heads.

    Its minimum is the teacher's mean entropy, reached if the weights are equal.
    """
    tiny = torch.finfo(student.dtype).tiny
    crossed = -(teacher * torch.log(student.clamp_min(tiny))).sum(-1)
    seen = teacher.sum(-1) > 0
    return (torch.where(seen, crossed, 0.0).sum((0, 2)) / seen.sum((0, 2)).clamp_min(1)).sum()


@final
class AttentionMimicry(Objective):
    """`distillation_loss` as an objective: an operator's weights against a teacher's, on given queries and keys.

    The model is an operator, and a batch holds "q" and "k". No labels are read.

    Args:
        teacher: the operator to imitate; None is softmax attention with its usual scale.
        causal: whether attention is causal.
    """

    def __init__(self, teacher: Operator | None = None, *, causal: bool = False) -> None:
        super().__init__()
        self.teacher, self.causal = teacher or Softmax(), causal

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        if not isinstance(model, Operator):
            raise OptionError(f"model must be an operator with weights; got {type(model).__name__}")
        if missing := [name for name in ("q", "k") if name not in batch]:
            raise OptionError(f'batch must hold "q" and "k"; it lacks {missing[0]}')
        q, k = batch["q"], batch["k"]
        with torch.no_grad():
            target = self.teacher.weights(q, k, causal=self.causal)
        student = model.weights(q, k, causal=self.causal)
        return Loss(distillation_loss(student, target), outputs=student)

    def plain(self, model: nn.Module, batch: Batch) -> Loss:
        return self(model, batch)

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Batch]:
        from foveate.ops.linear.hedgehog import Hedgehog

        q, k = torch.randn(2, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
        return cls(causal=True), Hedgehog.example(4, 8, 6), {"q": q, "k": k}


def distill(
    op: Operator, batches: Sequence[tuple[Tensor, Tensor]], *, steps: int, lr: float = 1e-2, causal: bool = False,
    teacher: Operator | None = None,
) -> list[float]:  # fmt: skip
    """Train all of `op`'s parameters with Adam on the teacher's weights; return the loss of each step.

    Args:
        op: an operator with parameters and weights; only its parameters change.
        batches: pairs `q (B, Hq, Nq, D)`, `k (B, Hkv, Nk, D)` as the frozen model's layer computes them, used in turn.
        steps, lr: the optimiser's number of steps and learning rate.
        causal: True if the model is causal.
        teacher: the operator to imitate; None is softmax attention with its usual scale.
    """
    validate.count("steps", steps, 1)
    parameters = [p for p in op.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(f"op={op.name} must have parameters to train; it has none")
    if not batches:
        raise OptionError("batches must hold at least one pair (q, k); got none")
    objective = AttentionMimicry(teacher, causal=causal)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for q, k in islice(cycle(batches), steps):
        with torch.enable_grad():
            loss = objective(op, {"q": q.detach(), "k": k.detach()}).total
            grads = torch.autograd.grad(loss, parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimiser.step()
        losses.append(loss.item())
    optimiser.zero_grad(set_to_none=True)
    return losses


def attention_entropy(weights: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h"]:
    """Return the rows' mean entropy in nats, for rows that sum to 1: low if they are peaked, `log Nk` if uniform."""
    rows = torch.special.entr(weights).sum(-1)
    return rows.sum(-1) / (weights.sum(-1) > 0).sum(-1).clamp_min(1)


def monotonicity(scores: Float[Tensor, "b h q k"], weights: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h"]:
    """Return Spearman's rank correlation of scores (such as `q . k`) and weights over the keys, averaged over queries.

    It is 1 if a larger score always gives a larger weight, as in a softmax.
    """
    a, b = (_ranks(x) for x in (scores, weights))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    spread = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(spread > 0, (a * b).sum(-1) / spread.clamp_min(torch.finfo(a.dtype).tiny), 0.0).mean(-1)


def _ranks(x: Tensor) -> Tensor:
    """Return ranks along the last axis; equal values share their mean rank."""
    ordered = x.contiguous().sort(-1).values
    below = torch.searchsorted(ordered, x.contiguous())
    up_to = torch.searchsorted(ordered, x.contiguous(), right=True)
    return (below + up_to).to(torch.float32 if x.dtype != torch.float64 else x.dtype) / 2
