"""Text of a second-order Markov chain whose end repeats its beginning, and the loss of causal models on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SYMBOLS, LENGTH, COPIED = 8, 48, 8


def chain(generator: torch.Generator) -> Tensor:
    """Return the distribution after each pair of symbols, `(symbols, symbols, symbols)`, with few likely symbols."""
    return (2.5 * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator)).softmax(-1)


def text(count: int, table: Tensor, generator: torch.Generator) -> Tensor:
    """Return text `(count, LENGTH)` whose last `COPIED` symbols repeat the first ones."""
    symbols = [torch.randint(SYMBOLS, (count,), generator=generator) for _ in range(2)]
    while len(symbols) < LENGTH - COPIED:
        symbols.append(torch.multinomial(table[symbols[-2], symbols[-1]], 1, generator=generator)[:, 0])
    return torch.stack([*symbols, *symbols[:COPIED]], 1)


def loss_after(
    make: Callable[[], nn.Module], *, seed: int, steps: int = 250, batch: int = 16, lr: float = 8e-3
) -> float:
    """Return the mean loss on fresh text, in nats a symbol, after training on the chain of that seed."""
    random = torch.Generator().manual_seed(seed)
    table = chain(random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        _loss(net, text(batch, table, random)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return _loss(net, text(256, table, random)).item()


def _loss(net: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(net(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:])
