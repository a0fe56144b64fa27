"""The base class of initialisers: they set some parameters of a model, in place, from a generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import nn

from foveate.core.checked import Checked


class Initialiser(Checked, ABC):
    """A way to start the training of a model."""

    @abstractmethod
    def __call__(self, model: nn.Module, generator: torch.Generator | None = None) -> list[str]:
        """Set parameters in place and return their names; all others stay as they are.

        Args:
            model: the model.
            generator: the source of random numbers; None for torch's global one.

        Raises:
            UnsupportedModel: the model has no parts to which the method applies.
        """

    @classmethod
    def example(cls) -> tuple[Self, nn.Module]:
        """Make an initialiser and a small model to which it applies; tests run them."""
        raise NotImplementedError(f"{cls.__name__} has to define example")
