"""The training loop: it takes batches, trains a network, and records losses and scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import DivergedError, OptionError
from foveate.tasks.base.training_task import HELDOUT, IGNORED, TrainingTask, accuracy

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Schedule:
    """The length and pace of a training.

    Args:
        steps: optimiser steps.
        batch: sequences per step.
        rate: the peak learning rate: linear warm-up over the first tenth of the steps, then cosine decay to 0.
        decay: AdamW's weight decay, for matrices.
        clip: the largest norm of the gradient.
        seed: the seed of the batches.
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
    """The record of a training: the loss of every step, and the held-out score after some of them."""

    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Return the last score."""
        return self.scores[max(self.scores)]


class Training:
    """A training that advances step by step; between two steps it can be saved (`state`) and resumed (`restore`).

    A resumed training gives the same numbers, bit for bit, as an uninterrupted one.

    Args:
        net: maps tokens or images to logits; it is trained in place.
        evaluations: how often to evaluate on held-out data, the last time at the end.
        heldout: the number of held-out examples.
    """

    def __init__(
        self, net: nn.Module, task: TrainingTask, schedule: Schedule, *, evaluations: int = 10, heldout: int = 256
    ) -> None:
        self.net, self.task, self.schedule, self.heldout = net, task, schedule, heldout
        self.history, self.seconds = History(), 0.0
        self._every = max(1, schedule.steps // max(1, evaluations))
        self._generator = torch.Generator().manual_seed(schedule.seed)
        self._trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self._trained if p.ndim > 1], "weight_decay": schedule.decay},
            {"params": [p for p in self._trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return len(self.history.losses)

    @property
    def done(self) -> bool:
        return self.step >= self.schedule.steps

    @property
    def note(self) -> str:
        """A short description of the progress."""
        scored = f", accuracy {self.history.score:.1%}" if self.history.scores else ""
        return f"loss {self.history.losses[-1]:.3f}{scored}" if self.history.losses else ""

    def advance(self) -> None:
        """Train one step, and evaluate on held-out data if that is due.

        Raises:
            DivergedError: if the loss is not finite; the message names the step.
        """
        start, step = time.perf_counter(), self.step
        self.net.train()
        for group in self._optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(step)
        loss = loss_of(self.net, *self.task.sample(self.schedule.batch, self._generator))
        if not math.isfinite(value := loss.item()):
            raise DivergedError(
                f"rate={self.schedule.rate} must be lower for this network: the loss is {value} at step {step}"
            )
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.schedule.clip)
        self._optimiser.step()
        self.history.losses.append(value)
        if self.step % self._every == 0 or self.done:
            self.history.scores[self.step] = evaluate(self.net, self.task, self.heldout)
        self.seconds += time.perf_counter() - start

    def state(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on, as CPU tensors, without `history` and `seconds`."""
        found = {f"net.{name}": x for name, x in self.net.state_dict().items()}
        for index, parameter in enumerate(self._trained):
            for name, x in self._optimiser.state.get(parameter, {}).items():
                found[f"optimiser.{index}.{name}"] = x
        found |= {"random.batches": self._generator.get_state(), "random.cpu": torch.get_rng_state()}
        if (device := self._device).type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(device)
        return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in found.items()}

    def restore(self, state: dict[str, Tensor], history: History, seconds: float = 0.0) -> None:
        """Resume from what `state` returned, in a training created with the same arguments."""
        self.net.load_state_dict({n.removeprefix("net."): x for n, x in state.items() if n.startswith("net.")})
        for index, parameter in enumerate(self._trained):
            prefix = f"optimiser.{index}."
            own = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
            if own:  # AdamW keeps its step count on the CPU
                self._optimiser.state[parameter] = {n: x if n == "step" else x.to(parameter) for n, x in own.items()}
        self._generator.set_state(state["random.batches"])
        torch.set_rng_state(state["random.cpu"])
        if "random.cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"], self._device)
        self.history, self.seconds = History(list(history.losses), dict(history.scores)), seconds

    @property
    def _device(self) -> torch.device:
        return next(self.net.parameters()).device


def fit(
    net: nn.Module, task: TrainingTask, schedule: Schedule, *, evaluations: int = 10, heldout: int = 256,
    progress: Progress | None = None,
) -> History:  # fmt: skip
    """Train `net` on `task` in place, from the first step to the last.

    Args:
        net, task, schedule, evaluations, heldout: see `Training`.
        progress: called as `progress(step, steps, note)` after every step.

    Raises:
        DivergedError: if the loss is not finite; the message names the step.
    """
    training = Training(net, task, schedule, evaluations=evaluations, heldout=heldout)
    while not training.done:
        training.advance()
        if progress is not None:
            progress(training.step, schedule.steps, training.note)
    net.eval()
    return training.history


def loss_of(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy over the labelled positions, on the network's device."""
    device = next(net.parameters()).device
    logits = net(inputs.to(device)).flatten(0, -2).float()
    return F.cross_entropy(logits, labels.flatten().to(device), ignore_index=IGNORED)


@torch.no_grad()
def evaluate(net: nn.Module, task: TrainingTask, count: int = 256, *, batch: int = 64, seed: int = HELDOUT) -> float:
    """Return the accuracy on held-out data; another seed draws other examples."""
    was_training, device = net.training, next(net.parameters()).device
    inputs, labels = task.heldout(count, seed)
    net.eval()
    logits = torch.cat([net(part.to(device)).cpu() for part in inputs.split(batch)])
    net.train(was_training)
    return accuracy(logits, labels)
