"""Handwritten digits of 8 by 8 pixels: the images that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from foveate.core.errors import TaskError
from foveate.tasks.base.training_task import TrainingTask


@dataclass(frozen=True)
class Digits(TrainingTask):
    """`(B, 1, 8, 8)` images in 0..1 and their digits `(B,)`. Every fifth image is held out, whatever the seed."""

    vocabulary = 10
    length = 64
    side = 8
    name = "digits"

    def sample(self, count: int, generator: torch.Generator, *, heldout: bool = False) -> tuple[Tensor, Tensor]:
        images, labels = _split(heldout)
        drawn = torch.randint(len(images), (count,), generator=generator)
        return images[drawn], labels[drawn]

    def heldout(self, count: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return all held-out images, or the first `count`."""
        images, labels = _split(True)
        return (images[:count], labels[:count]) if count else (images, labels)


@cache
def _split(heldout: bool) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskError("the task digits reads scikit-learn's images: pip install scikit-learn") from None
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target)
    held = torch.arange(len(images)) % 5 == 0
    return images[held if heldout else ~held], labels[held if heldout else ~held]
