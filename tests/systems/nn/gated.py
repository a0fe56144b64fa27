"""Small problems for gates: a gate and a linear head are trained on drawn maps, or a small CNN with gates on digits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn import insert
from tests.systems.nn import digits

#: (count, generator) -> the inputs of a net, and its target.
Draw = Callable[[int, torch.Generator], tuple[tuple[Tensor, ...], Tensor]]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(gate: nn.Module, seed: int = 0, spread: float = 0.5) -> nn.Module:
    """Return the gate in float64 and eval mode, with random parameters and running statistics."""
    random = torch.Generator().manual_seed(seed)
    gate = gate.double()
    with torch.no_grad():
        for name, tensor in (*gate.named_parameters(), *gate.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(spread * torch.randn(tensor.shape, generator=random, dtype=torch.float64))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return gate.eval()


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """Apply a batch norm by its running statistics, as the formula writes it."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var, gain, bias = (
        t.view(shape) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )  # fmt: skip
    return (x - mean) / (var + 1e-5).sqrt() * gain + bias


class MeanOverPositions(nn.Module):
    """A gate, the mean over the positions, and a linear layer."""

    def __init__(self, gate: nn.Module, channels: int, outputs: int) -> None:
        super().__init__()
        self.gate, self.head = gate, nn.Linear(channels, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.gate(*inputs).flatten(2).mean(-1))


class EachPosition(nn.Module):
    """A gate, and a linear layer at each position: `(B, C, *space)` to `(B, N, outputs)`."""

    def __init__(self, gate: nn.Module, channels: int, outputs: int) -> None:
        super().__init__()
        self.gate, self.head = gate, nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(x).flatten(2).mT)


def trained(
    make: Callable[[], nn.Module], draw: Draw, *, steps: int = 300, lr: float = 0.03, count: int = 128, seed: int = 0
) -> nn.Module:
    """Return a net that was trained by squared error on drawn examples, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make().train()
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        inputs, target = draw(count, random)
        optimiser.zero_grad()
        F.mse_loss(net(*inputs), target).backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def left_over(net: nn.Module, draw: Draw) -> float:
    """Return the share of the target's variance that a net leaves over on new examples."""
    inputs, target = draw(2000, torch.Generator().manual_seed(10**6))
    return (F.mse_loss(net(*inputs), target) / target.var()).item()


def unexplained(make: Callable[[], nn.Module], draw: Draw, **options) -> float:
    """Train a net, and return the share that it leaves over."""
    return left_over(trained(make, draw, **options), draw)


class SmallCNN(nn.Module):
    """Three convolutions, the mean over positions and a linear head, for digits."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = zip((1, width, width), (1, 2, 1), strict=True)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(size, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                for size, stride in sizes
            )
        )
        self.head = nn.Linear(width, digits.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images[:, None]).mean((2, 3)))


def digits_accuracy(key: str | None, *, seeds: int = 2, epochs: int = 6, **options) -> float:
    """Train the small CNN with a gate behind its last two stages; return the mean accuracy on the test images."""
    found = []
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SmallCNN()
            if key is not None:
                insert(net, key, ["stages.1", "stages.2"], torch.zeros(1, 8, 8), **options)
        found.append(digits.accuracy(digits.fit(net, seed, epochs, lr=0.01)))
    return sum(found) / seeds


def refused(make: Callable[[], object]) -> str:
    """Return the message with which options are refused, one line."""
    with pytest.raises(OptionError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)
