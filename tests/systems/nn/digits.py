"""Handwritten digits (scikit-learn's, 8x8 pixels) and a tiny vision transformer around any layer.

    net = fit(vit(lambda dim, heads: MultiHeadAttention(dim, heads)), seed=0, epochs=12)
    accuracy(net)

An epoch of the default net (16 tokens of 2x2 patches, 2 blocks, width 64) takes about 0.3 s on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn import Block, Layer

MakeLayer = Callable[[int, int], Layer]  # (dim, heads) -> the layer of one block
PIXELS, CLASSES, TRAIN = 8, 10, 1347


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images `(n, 8, 8)` in -1..1 and labels: 1347 to train on, 450 to test on; always the same split."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, digit = map(torch.tensor, datasets.load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, PIXELS, PIXELS) / 8 - 1
    order = torch.randperm(len(digit), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return images[train], digit[train], images[test], digit[test]


class ViT(nn.Module):
    """Patches, learned positions, blocks around the given layers, the mean over tokens, a linear head."""

    def __init__(self, make_layer: MakeLayer, depth: int, dim: int, heads: int, patch: int) -> None:
        super().__init__()
        if PIXELS % patch:
            raise OptionError(f"patch={patch} must divide {PIXELS}")
        self.patch, self.side = patch, PIXELS // patch
        self.embed = nn.Linear(patch * patch, dim)
        self.place = nn.Parameter(0.02 * torch.randn(self.side * self.side, dim))
        self.blocks = nn.ModuleList(Block(make_layer(dim, heads)) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, CLASSES)

    def tokens(self, images: Tensor) -> Tensor:
        """Embed patches, `(B, 8, 8)` to `(B, N, C)`, row by row."""
        patches = images.unflatten(2, (-1, self.patch)).unflatten(1, (-1, self.patch)).transpose(2, 3)
        return self.embed(patches.flatten(3).flatten(1, 2)) + self.place

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x, size=(self.side, self.side)) if block.mixer.capabilities.grid else block(x)
        return self.head(self.norm(x).mean(1))


def vit(make_layer: MakeLayer, depth: int = 2, dim: int = 64, heads: int = 4, patch: int = 2, *, seed: int = 0) -> ViT:
    """Make a net with parameters from `seed`; it calls `make_layer(dim, heads)` once for each block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(make_layer, depth, dim, heads, patch)


def cross_entropy(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels)


def fit(
    net: nn.Module, seed: int = 0, epochs: int = 12, *, lr: float = 3e-3, batch: int = 64, examples: int = TRAIN,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy,
) -> nn.Module:  # fmt: skip
    """Train in place on the first `examples` images: AdamW, one cycle of the rate; `seed` orders the batches.

    The net returns in eval mode. `seed` also seeds torch's global generator, for layers that draw from it.
    """
    images, labels, _, _ = data()
    order = torch.Generator().manual_seed(seed)
    steps = -(-examples // batch)
    wanted = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(wanted, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.train()
        for _ in range(epochs):
            for chosen in torch.randperm(examples, generator=order).split(batch):
                optimiser.zero_grad()
                loss(net, images[chosen], labels[chosen]).backward()
                nn.utils.clip_grad_norm_(wanted, 1.0)
                optimiser.step()
                schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """Return the share of the 450 test images that the net classifies right."""
    _, _, images, labels = data()
    return (net(images).argmax(-1) == labels).float().mean().item()
