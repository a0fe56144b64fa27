"""The units of a MAC step: control reads the question, the read unit reads the image, and memory takes both in.

The control unit is that of MAC, or that of DAFT, whose logits flow on from the step before.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.scoring import safe_softmax
from foveate.nn.fusion.daft import DAFTAttention
from foveate.nn.parts.linear_maps import xavier_linear
from foveate.nn.parts.ode import Solver


class Controlled(NamedTuple):
    """The control of a step, with its attention to words and the evaluations of DAFT's equation."""

    control: Float[Tensor, "b d"]
    logits: Float[Tensor, "b s"]
    weights: Float[Tensor, "b s"]
    evaluations: Int[Tensor, " b"]


@final
class ControlUnit(nn.Module):
    """MAC's control: `softmax(w · (q_t * cw_s) + b) cw` with `q_t = W_t tanh(W q)`, from scratch in each step."""

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.shared = xavier_linear(dim, dim)
        self.questions = nn.ModuleList(xavier_linear(dim, dim) for _ in range(steps))
        self.attend = xavier_linear(dim, 1)

    def forward(
        self, step: int, context: Float[Tensor, "b s d"], query: Float[Tensor, "b d"], real: Bool[Tensor, "b s"],
        before: Tensor | None,
    ) -> Controlled:  # fmt: skip
        question = self.questions[step](torch.tanh(self.shared(query)))
        logits = self.attend(question[:, None] * context).squeeze(-1)
        weights = safe_softmax(logits.masked_fill(~real, masks.NEG_INF))
        control = (weights[:, None] @ context).squeeze(1)
        return Controlled(control, logits, weights, torch.zeros(len(query), dtype=torch.long, device=query.device))


@final
class DAFTControlUnit(nn.Module):
    """DAFT's control: each step has an equation of its own, and moves the logits that the step before left."""

    def __init__(self, dim: int, steps: int, solver: Solver, tolerance: float, solver_steps: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            DAFTAttention(dim, solver, rtol=tolerance, atol=tolerance, steps=solver_steps, learned_start=step == 0)
            for step in range(steps)
        )

    def forward(
        self, step: int, context: Float[Tensor, "b s d"], query: Float[Tensor, "b d"], real: Bool[Tensor, "b s"],
        before: Tensor | None,
    ) -> Controlled:  # fmt: skip
        return Controlled(**self.steps[step](context, query, before, masks={"context": real}))


@final
class ReadUnit(nn.Module):
    """Read the image: the mean of `W_k k` by weights `softmax(w · ELU(c * MLP([W_m m * (W_k k) ; W_k k])))`."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.knowledge = xavier_linear(dim, dim)
        self.memory = xavier_linear(dim, dim)
        self.interaction = nn.Sequential(xavier_linear(2 * dim, dim), nn.ELU(), xavier_linear(dim, dim))
        self.attend = xavier_linear(dim, 1)

    def forward(
        self, memory: Float[Tensor, "b d"], knowledge: Float[Tensor, "b n d"], control: Float[Tensor, "b d"],
        real: Bool[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n"]]:  # fmt: skip
        """Return what is read, and the weights of the image's places."""
        known = self.knowledge(self.drop(knowledge))
        recalled = self.memory(self.drop(memory))[:, None] * known
        met = F.elu(self.interaction(torch.cat([recalled, known], -1)) * control[:, None])
        logits = self.attend(self.drop(met)).squeeze(-1)
        weights = safe_softmax(logits.masked_fill(~real, masks.NEG_INF))
        return (weights[:, None] @ known).squeeze(1), weights
