"""The loop: batches in, a trained network and its losses out."""

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
from foveate.tasks.base.training_task import HELDOUT, IGNORED, Drill, accuracy

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


class Training:
    """One training, step by step: between two steps it can be put down (`state`) and taken up again (`restore`).

    A training that was put down and taken up gives the same numbers, bit for bit, as one that was not.

    Args:
        net: tokens or images in, logits out; trained in place.
        looks: how many times the score on held-out data is taken, the last time at the end.
        heldout: examples for that.
    """

    def __init__(
        self, net: nn.Module, drill: Drill, schedule: Schedule, *, looks: int = 10, heldout: int = 256
    ) -> None:
        self.net, self.drill, self.schedule, self.heldout = net, drill, schedule, heldout
        self.history, self.seconds = History(), 0.0
        self._every = max(1, schedule.steps // max(1, looks))
        self._generator = torch.Generator().manual_seed(schedule.seed)
        self._trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self._trained if p.ndim > 1], "weight_decay": schedule.decay},
            {"params": [p for p in self._trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history.losses)

    @property
    def done(self) -> bool:
        return self.step >= self.schedule.steps

    @property
    def note(self) -> str:
        """How it stands, in words."""
        scored = f", accuracy {self.history.score:.1%}" if self.history.scores else ""
        return f"loss {self.history.losses[-1]:.3f}{scored}" if self.history.losses else ""

    def advance(self) -> None:
        """One step, and a look at held-out data where one is due.

        Raises:
            DivergedError: a loss that is no number any more, with the step at which that came.
        """
        begun, step = time.perf_counter(), self.step
        self.net.train()
        for group in self._optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(step)
        loss = loss_of(self.net, *self.drill.sample(self.schedule.batch, self._generator))
        if not math.isfinite(value := loss.item()):
            raise DivergedError(
                f"the loss is {value} at step {step}: rate={self.schedule.rate} is too high for this network"
            )
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.schedule.clip)
        self._optimiser.step()
        self.history.losses.append(value)
        if self.step % self._every == 0 or self.done:
            self.history.scores[self.step] = evaluate(self.net, self.drill, self.heldout)
        self.seconds += time.perf_counter() - begun

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, as tensors on the CPU; `history` and `seconds` are not in it."""
        found = {f"net.{name}": x for name, x in self.net.state_dict().items()}
        for index, parameter in enumerate(self._trained):
            for name, x in self._optimiser.state.get(parameter, {}).items():
                found[f"optimiser.{index}.{name}"] = x
        found |= {"random.batches": self._generator.get_state(), "random.cpu": torch.get_rng_state()}
        if (device := self._device).type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(device)
        return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in found.items()}

    def restore(self, state: dict[str, Tensor], history: History, seconds: float = 0.0) -> None:
        """Take up what `state` put down, in a training made with the same arguments."""
        self.net.load_state_dict({n.removeprefix("net."): x for n, x in state.items() if n.startswith("net.")})
        for index, parameter in enumerate(self._trained):
            prefix = f"optimiser.{index}."
            own = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
            if own:  # the count of steps stays on the CPU, as AdamW has it
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
    net: nn.Module, drill: Drill, schedule: Schedule, *, looks: int = 10, heldout: int = 256,
    progress: Progress | None = None,
) -> History:  # fmt: skip
    """Train `net` on `drill` in place, from the first step to the last.

    Args:
        net, drill, schedule, looks, heldout: as for `Training`.
        progress: called as `progress(step, steps, note)` after every step.

    Raises:
        DivergedError: a loss that is no number any more, with the step at which that came.
    """
    training = Training(net, drill, schedule, looks=looks, heldout=heldout)
    while not training.done:
        training.advance()
        if progress is not None:
            progress(training.step, schedule.steps, training.note)
    net.eval()
    return training.history


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
