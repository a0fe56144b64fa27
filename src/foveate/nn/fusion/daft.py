"""Dynamics of attention for focus transition: logits flow from one reasoning step to the next.

Learning Dynamics of Attention: Human Prior for Interpretable Machine Reasoning (2019), arXiv 1905.11666.
"""

from __future__ import annotations

import math
from typing import Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import ShapeError, shown
from foveate.core.scoring import safe_softmax
from foveate.nn.base.fusion import Fusion, Stream
from foveate.nn.parts.linear_maps import xavier_linear
from foveate.nn.parts.ode import Slope, Solver, check_options, solve_ode


@final
class DAFTAttention(Fusion):
    """One reasoning step's attention to words, whose logits move for a unit of time from where the last step left them.

    `da_s/du = v · [q(u) * cw_s ; a_s] + e` with `q(u) = W [u ; q] + b`, and the control is `softmax(a(1)) cw`. Steps in
    a row start from each other's logits, so that the focus drifts rather than jumps; `total_length_of_transition`
    measures by how much. The words cost O(S d) once and each evaluation of the slope O(S). The wrong choice for a
    single reading, where it is additive attention with a solver around it.

    Streams are the words `context` `(B, S, d)`, the question `query` `(B, d)` and, optional, the `logits` `(B, S)` of
    the step before. Outputs are `control` `(B, d)`, `logits` and `weights` `(B, S)`, zeros for padding, and
    `evaluations` `(B,)`, the solver's evaluations of the slope. Words without logits start at a learned number a_0;
    since the equation is linear in a, with one rate for all words, a_0 shifts all logits alike and no weight. Without a
    question logits stay as they are.

    Args:
        dim: d.
        solver: "dopri5", "rk4" or "euler", see `foveate.nn.solve_ode`. Training takes "dopri5"; "rk4" is enough for a
            trained network. "euler" in one step is the residual update `a + f(0, a)`.
        rtol, atol: tolerances of "dopri5", which holds them for each example's own words.
        steps: steps of "rk4" and "euler".
        learned_start: whether a_0 is learned; 0 if not, as for steps that always get logits.

    Raises:
        OptionError: an option out of range.

    The release hands -1e30 for padding on to the next step and chooses one step size for a batch; here padding and
    other examples have no effect on an example's steps.
    """

    def __init__(
        self, dim: int = 512, solver: Solver = "dopri5", *, rtol: float = 1e-3, atol: float = 1e-3, steps: int = 4,
        learned_start: bool = True,
    ) -> None:  # fmt: skip
        validate.count("dim", dim, 1)
        check_options(solver, rtol, atol, steps)
        words = ("S",)
        super().__init__(
            (Stream("context", dim, words), Stream("query", dim, ()), Stream("logits", None, words, optional=True)),
            (Stream("control", dim, ()), Stream("logits", None, words), Stream("weights", None, words),
             Stream("evaluations", None, ())),
        )  # fmt: skip
        self.solver, self.rtol, self.atol, self.steps = solver, rtol, atol, steps
        self.question = xavier_linear(dim + 1, dim)
        self.change = xavier_linear(dim + 1, 1)
        self.first_logit = nn.Parameter(torch.zeros(())) if learned_start else None

    @classmethod
    def example(cls) -> Self:
        return cls(6, rtol=1e-6, atol=1e-6)

    def _fuse(self, x: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, Tensor]:
        context, words = x["context"], real["context"]
        slope = self._slope(context, x["query"], real["query"])
        wide = torch.promote_types(context.dtype, torch.float32)  # the error of a half-precision step is its rounding
        start = self._start(x, real).to(wide)
        end, evaluations = solve_ode(
            slope, start, self.solver, rtol=self.rtol, atol=self.atol, steps=self.steps, real=words
        )
        logits = end.masked_fill(~words, 0.0).to(context.dtype)
        weights = safe_softmax(end.masked_fill(~words, masks.NEG_INF)).to(context.dtype)
        control = (weights[:, None] @ context).squeeze(1)
        return {"control": control, "logits": logits, "weights": weights, "evaluations": evaluations}

    def _start(self, x: dict[str, Tensor], real: dict[str, Tensor]) -> Float[Tensor, "b s"]:
        """Return the step before's logits, a_0 where there are none, and 0 for padding."""
        words, context = real["context"], x["context"]
        start = context.new_zeros(words.shape) if self.first_logit is None else self.first_logit.expand(words.shape)
        if "logits" in x:
            start = torch.where(real["logits"], x["logits"], start)
        return start.masked_fill(~words, 0.0)

    def _slope(self, context: Tensor, query: Tensor, asked: Bool[Tensor, " b"]) -> Slope:
        """Return `(u, a) -> da/du`: `still + u * moving + rate * a`, in which the words are read once."""
        of_words, rate = self.change.weight[0, :-1], self.change.weight[0, -1]
        at_start = self.question(torch.cat([torch.zeros_like(query[:, :1]), query], -1))
        still = (context @ (of_words * at_start)[..., None]).squeeze(-1) + self.change.bias
        moving = context @ (of_words * self.question.weight[:, 0])

        def slope(u: Tensor, a: Tensor) -> Tensor:
            return (still + u * moving + rate * a).masked_fill(~asked[:, None], 0.0)

        return slope


def total_length_of_transition(weights: Float[Tensor, "p b s"]) -> Float[Tensor, " b"]:
    """Return by how much attention drifts over P reasoning steps: 0 if it stays, 1 a step if it jumps, at most P - 1.

    It is the sum, over pairs of steps in a row, of the Jensen-Shannon divergence of their weights over log 2. Padding
    has a weight of 0, and so has everything in examples without a word, whose length is 0.

    Args:
        weights: attention weights of each step, which add up to 1.

    Raises:
        ShapeError: weights of another rank, or of no step.
    """
    if not isinstance(weights, Tensor) or weights.dim() != 3 or not len(weights):
        raise ShapeError(f"weights must be (P, B, S) with P > 0; got {shown(weights)}")
    before, after = weights[:-1], weights[1:]
    divergence = _entropy((before + after) / 2) - (_entropy(before) + _entropy(after)) / 2
    return divergence.sum((0, -1)) / math.log(2)


def _entropy(p: Tensor) -> Tensor:
    """Return `-p log p`, with a gradient of 0 where p is 0."""
    return torch.special.entr(p.clamp(min=torch.finfo(p.dtype).tiny))
