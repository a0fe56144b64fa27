"""The base class of initialisers: they set some parameters of a model, in place, from a generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self, final

import torch
from torch import nn

from foveate.core.checked import Checked


class Initialiser(Checked, ABC):
    """A way to start the training of a model. Subclasses define `_set`."""

    @final
    @torch.no_grad()
    def __call__(self, model: nn.Module, generator: torch.Generator | None = None) -> list[str]:
        """Set parameters in place and return their names; all others stay as they are.

        Args:
            model: the model.
            generator: the source of random numbers; None for torch's global one.

        Raises:
            OptionError: the model has no parts to which the method applies.
        """
        before = {name: parameter._version for name, parameter in model.named_parameters()}
        self._set(model, generator)
        # a tensor's version counts the writes to it and to its views, so that no copy of the model is needed
        return [name for name, parameter in model.named_parameters() if parameter._version != before[name]]

    @abstractmethod
    def _set(self, model: nn.Module, generator: torch.Generator | None) -> None:
        """Set parameters in place."""

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Mapping[str, Any]]:
        """Make an initialiser, a small model to which it applies and inputs of the model; tests run them."""
        raise NotImplementedError(f"{cls.__name__} has to define example")
