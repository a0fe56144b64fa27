"""Copying from given distances, and a small causal model around any layer, for claims about heads.

Each token shows a symbol and one of a few lags; the target is the symbol that many tokens back. A layer has to attend
to several positions, and a token needs one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn import Block, Layer

SYMBOLS = 16


def examples(count: int, length: int, lags: tuple[int, ...], random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return symbols, lags and answers, each `(count, length)`; an answer before the first token is -100."""
    symbols = torch.randint(SYMBOLS, (count, length), generator=random)
    wishes = torch.randint(len(lags), (count, length), generator=random)
    at = torch.arange(length) - torch.tensor(lags)[wishes]
    return symbols, wishes, symbols.gather(1, at.clamp(min=0)).masked_fill(at < 0, -100)


class Copier(nn.Module):
    """Embeddings with sinusoidal positions, causal blocks, a linear head."""

    def __init__(self, make_layer: Callable[[int, int], Layer], depth: int, dim: int, heads: int, lags: int) -> None:
        super().__init__()
        self.symbol, self.wish = nn.Embedding(SYMBOLS, dim), nn.Embedding(lags, dim)
        self.blocks = nn.ModuleList(Block(make_layer(dim, heads)) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, SYMBOLS)

    def forward(self, symbols: Tensor, wishes: Tensor) -> Tensor:
        x = self.symbol(symbols) + self.wish(wishes) + 2 * places(symbols.shape[1], self.symbol.embedding_dim)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))


def places(length: int, dim: int) -> Tensor:
    angle = torch.arange(length)[:, None] * torch.exp(-torch.arange(0, dim, 2) / dim * math.log(100.0))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def fitted(
    make_layer: Callable[[int, int], Layer], lags: tuple[int, ...], *, seed: int = 0, steps: int = 400, depth: int = 1,
    dim: int = 64, heads: int = 8, length: int = 24, extra: Callable[[nn.Module], Tensor | float] = lambda net: 0.0,
) -> Copier:  # fmt: skip
    """Train a copier on `steps` batches of 64; `extra(net)` is added to its loss."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Copier(make_layer, depth, dim, heads, len(lags))
    optimiser = torch.optim.AdamW(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for _ in range(steps):
        symbols, wishes, answers = examples(64, length, lags, random)
        optimiser.zero_grad()
        (F.cross_entropy(net(symbols, wishes).flatten(0, 1), answers.flatten()) + extra(net)).backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def loss(net: Copier, lags: tuple[int, ...], length: int = 24, seed: int = 1000) -> float:
    """Return the mean cross-entropy on 256 fresh sequences; log 16 = 2.77 is chance."""
    symbols, wishes, answers = examples(256, length, lags, torch.Generator().manual_seed(seed))
    return F.cross_entropy(net(symbols, wishes).flatten(0, 1), answers.flatten()).item()
