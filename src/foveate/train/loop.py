"""The loop: batches in, a trained network and its losses out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import DivergedError, OptionError
from foveate.tasks.drill import HELDOUT, IGNORED, Drill, accuracy

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        steps: optimiser steps.
        batch: sequences in each.
        rate: the highest learning rate; it rises over the first tenth of the steps and falls to 0 along a cosine.
        decay: AdamW's weight decay, for matrices.
        clip: largest norm of a gradient.
        seed: of the batches.
    """

    steps: int = 1000
    batch: int = 32
    rate: float = 3e-3
    decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        validate.count("steps", self.steps, 1)
        validate.count("batch", self.batch, 1)
        validate.at_least("decay", self.decay, 0)
        for name, value in (("rate", self.rate), ("clip", self.clip)):
            if isinstance(value, bool) or not value > 0:
                raise OptionError(f"{name}={value!r} must be above 0")

    def rate_at(self, step: int) -> float:
        rising = max(1, self.steps // 10)
        if step < rising:
            return self.rate * (step + 1) / rising
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


@dataclass
class History:
    """What training went through: the loss of each step, and the score on held-out data at some of them."""

    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The last score."""
        return self.scores[max(self.scores)]


def fit(
    net: nn.Module, drill: Drill, schedule: Schedule, *, looks: int = 10, heldout: int = 256,
    progress: Progress | None = None,
) -> History:  # fmt: skip
    """Train `net` on `drill` in place.

    Args:
        net: tokens or images in, logits out.
        looks: how many times the score on held-out data is taken, the last time at the end.
        heldout: examples for that.
        progress: called as `progress(step, steps, note)` after every step.

    Raises:
        DivergedError: a loss that is no number any more, with the step at which that came.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    matrices = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))
    history, every, note = History(), max(1, schedule.steps // max(1, looks)), ""
    net.train()
    for step in range(schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = loss_of(net, *drill.sample(schedule.batch, generator))
        if not math.isfinite(value := loss.item()):
            raise DivergedError(
                f"the loss is {value} at step {step}: rate={schedule.rate} is too high for this network"
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), schedule.clip)
        optimiser.step()
        history.losses.append(value)
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            history.scores[step + 1] = evaluate(net, drill, heldout)
            note = f", accuracy {history.score:.1%}"
        if progress is not None:
            progress(step + 1, schedule.steps, f"loss {value:.3f}{note}")
    net.eval()
    return history


def loss_of(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over what is asked, on the network's device."""
    where = next(net.parameters()).device
    logits = net(inputs.to(where)).flatten(0, -2).float()
    return F.cross_entropy(logits, labels.flatten().to(where), ignore_index=IGNORED)


@torch.no_grad()
def evaluate(net: nn.Module, drill: Drill, count: int = 256, *, batch: int = 64, seed: int = HELDOUT) -> float:
    """Accuracy on held-out data; another seed draws other examples."""
    was, where, (inputs, labels) = net.training, next(net.parameters()).device, drill.heldout(count, seed)
    net.eval()
    logits = torch.cat([net(part.to(where)).cpu() for part in inputs.split(batch)])
    net.train(was)
    return accuracy(logits, labels)
