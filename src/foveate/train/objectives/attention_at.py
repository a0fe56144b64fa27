"""Adversarial training of attention: the loss is also taken at scores that are perturbed against the model.

Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training (2020), arXiv 2009.12064.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.models.language.bilstm_attention_classifier import BiLSTMAttentionClassifier
from foveate.train.base.objective import Batch, Criterion, Loss, Objective, inputs_of, labels_of, logits_of
from foveate.train.objectives.score_bias import Scored, takes_score_bias


class _Attacked(NamedTuple):
    """A clean pass and the perturbation that was found in it."""

    outputs: Scored
    loss: Float[Tensor, ""]
    r: Float[Tensor, "b *n t"]


@final
class AttentionAT(Objective):
    """`L(s) + lam L(s + r)`: the loss at attention's scores s, and at scores moved by r against the model.

    It makes attention robust to changes of its scores, and closer to gradients of the loss with respect to words.
    A step takes two forward passes, one backward pass as far as the scores, and one through the whole model. Nothing
    is perturbed at inference. The wrong choice where attention does not decide the output.

    Args:
        eps: the norm of r over the scores of an example. The paper tunes it for each data set.
        lam: the weight of the loss at perturbed scores.
        kind: "at" is `r = eps g / |g|` with `g = dL/ds`. "iat" moves each score along its differences from the others.
        difference: of "iat". "token" is the paper's: with `d_t = (s - s_t) / |s - s_t|` over the tokens of a text,
            `r_t = sum_k alpha_tk d_tk` and `alpha = eps g / |g|` with `g = dL/d alpha`. "batch" is the release's
            difference from other texts; there a variable that is 0 multiplies it, so that `r = -eps g / |g|` with
            g as in "at", whatever the differences.
        sign: 1 goes up the loss, -1 down; None is -1 for the release's "batch", and 1 otherwise.
        criterion: the loss L of logits and labels, a mean over examples.

    A score is one number, so that any direction for it is its own. With "token" r is therefore that of "at", but for
    texts whose scores are all equal: these have no differences, and are not moved.

    Padding is never perturbed. r takes no gradient. Trained as in the paper: Adam with AMSGrad at a rate of 1e-3, a
    weight decay of 1e-5 except on attention, 8 epochs of batches of 32.
    """

    def __init__(
        self, eps: float = 1.0, lam: float = 1.0, kind: Literal["at", "iat"] = "at",
        difference: Literal["token", "batch"] = "token", *, sign: Literal[-1, 1] | None = None,
        criterion: Criterion = F.cross_entropy,
    ) -> None:  # fmt: skip
        super().__init__(criterion)
        validate.at_least("eps", eps, 0)
        validate.at_least("lam", lam, 0)
        self.eps, self.lam, self.kind, self.difference = eps, lam, kind, difference
        released = kind == "iat" and difference == "batch"
        self.sign = sign if sign is not None else -1 if released else 1

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        found = self._attack(model, batch)
        moved = self._loss(takes_score_bias(model)(score_bias=found.r, **inputs_of(batch)), batch)
        return Loss.of(found.outputs, clean=found.loss, adversarial=self.lam * moved)

    def perturbation(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b *n t"]:
        """Return r for a batch. Given to the model as `score_bias`, it attacks it."""
        return self._attack(model, batch).r

    def _attack(self, model: nn.Module, batch: Batch) -> _Attacked:
        biased, inputs = takes_score_bias(model), inputs_of(batch)
        mask = biased.score_mask(**inputs)
        with torch.enable_grad():
            nothing = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
            outputs = biased(score_bias=nothing, **inputs)
            loss = self._loss(outputs, batch)
            (slope,) = torch.autograd.grad(loss, nothing, retain_graph=True)
        slope = self.sign * slope.masked_fill(~mask, 0.0)
        if self.kind == "iat" and self.difference == "token":
            r = along_differences(slope, token_differences(outputs.scores.detach(), mask))
        else:
            r = unit(slope)
        return _Attacked(outputs, loss, self.eps * r)

    def _loss(self, outputs: Scored, batch: Batch) -> Float[Tensor, ""]:
        return self.criterion(logits_of(outputs), labels_of(batch))

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Batch]:
        ids = torch.tensor([[3, 7, 9, 4, 2], [5, 1, 8, 0, 0], [6, 6, 2, 11, 0]])
        return cls(), BiLSTMAttentionClassifier.example(), {"ids": ids, "labels": torch.tensor([0, 1, 1])}


def unit(x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Return x over its norm for each example; an example of zeros stays zero. Tiny numbers do not underflow."""
    flat = x.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    flat = flat / largest.masked_fill(largest == 0, 1.0)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1.0)).view_as(x)


def token_differences(scores: Float[Tensor, "b *n t"], mask: Bool[Tensor, "b *n t"]) -> Float[Tensor, "b *n t t"]:
    """Return `d[t, k] = (s_k - s_t) / |s - s_t|` with the norm over k; 0 for padding, and where scores are equal."""
    axes = ["B", *["n"] * (scores.dim() - 2), "T"]
    validate.bool_mask("mask", mask, ", ".join(axes), tuple(scores.shape), scores.device)
    known = scores.masked_fill(~mask, 0.0).float()
    gap = known[..., None, :] - known[..., :, None]
    gap = gap.masked_fill(~(mask[..., None, :] & mask[..., :, None]), 0.0)
    norm = gap.norm(dim=-1, keepdim=True)
    return gap / norm.masked_fill(norm == 0, 1.0)


def along_differences(slope: Float[Tensor, "b *n t"], d: Float[Tensor, "b *n t t"]) -> Float[Tensor, "b *n t"]:
    """Return `r_t = sum_k alpha_tk d_tk`; alpha is the unit gradient in alpha at 0, `slope_t d_tk`."""
    alpha = unit(slope[..., None] * d)
    return (alpha * d).sum(-1)


def gradient_correlation(
    model: BiLSTMAttentionClassifier, batch: Batch, criterion: Criterion = F.cross_entropy
) -> Float[Tensor, " b"]:
    """Return Pearson's correlation, for each text, of attention's weights with the gradient's norm at each word.

    The paper's measure of how well attention explains a model. The gradient is that of the loss with respect to the
    word's embedding, with the weights held fixed as in Attention is not Explanation (2019). Padding does not count; 0
    where one of the two is constant.
    """
    ids = batch["ids"]
    embedded, mask = model.embedding(ids).detach().requires_grad_(), model.score_mask(ids)
    with torch.enable_grad():
        hidden = model.encode(embedded, mask)
        weights = model.attend(hidden, mask).weights.detach()
        (slope,) = torch.autograd.grad(criterion(model.classify(hidden, weights), labels_of(batch)), embedded)
    count = mask.sum(1, keepdim=True).clamp_min(1)
    a, b = (
        (x - (x * mask).sum(1, keepdim=True) / count).masked_fill(~mask, 0.0) for x in (weights, slope.norm(dim=-1))
    )
    return (unit(a) * unit(b)).sum(1)
