"""Small `ViT`s of transformers, trained on scikit-learn's digits (8 by 8 pixels) in a few seconds.

model = classifier(layers=2, heads=4, patch=2, seed=0)
accuracy(model, *heldout())
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from foveate.tasks.training.digits import Digits

CLASSES = 10


@cache
def train_set() -> tuple[Tensor, Tensor]:
    """Return the images `(n, 1, 8, 8)`, each once, and the digits to train on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    held = torch.arange(len(bunch.images)) % 5 == 0
    return torch.tensor(bunch.images, dtype=torch.float32)[~held, None] / 16, torch.tensor(bunch.target)[~held]


def heldout() -> tuple[Tensor, Tensor]:
    """Return the held-out images and digits: 360."""
    return Digits().heldout()


def config(layers: int, heads: int, patch: int | tuple[int, int]) -> Any:
    return ViTConfig(
        image_size=8, patch_size=patch, num_channels=1, hidden_size=64, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=128, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def untrained(layers: int, heads: int, patch: int | tuple[int, int] = 2, seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(config(layers, heads, patch)).eval()


@cache
def classifier(
    layers: int, heads: int, patch: int | tuple[int, int] = 2, seed: int = 0, steps: int = 400
) -> ViTForImageClassification:
    """Return a ViT that was trained on the labels; it is shared: leave its weights as they are."""
    model, (images, labels) = untrained(layers, heads, patch, seed), train_set()
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=draw)
        loss = F.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(pixel_values=images).logits.argmax(-1) == labels).double().mean().item()
