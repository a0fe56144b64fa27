"""The base class of objectives: a model and a batch in, a loss and its parts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.checked import Checked


@dataclass(frozen=True)
class Loss:
    """A loss to minimise.

    Args:
        total: the scalar whose gradient trains the model.
        parts: its parts by name, as they entered the total, without a gradient; for logs.
        outputs: the model's outputs on the clean batch, if the objective computed them.
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    outputs: Any = None


class Objective(Checked, ABC):
    """A way to train a model: a callable on the model and a batch.

    It keeps no state between calls but its options and a random generator, and adds no parameters to the model. It runs
    in a plain loop, in Hugging Face's `Trainer` and in Lightning: see `foveate.train.loop.trainers`.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        """Return the loss of a batch.

        Args:
            model: the model in training mode; its parameters get gradients when the total is differentiated.
            batch: the inputs of the model by name, and its targets under "labels".
        """

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Mapping[str, Any]]:
        """Make an objective in which the mechanism has an effect, a small model and a batch; tests run them."""
        raise NotImplementedError(f"{cls.__name__} has to define example")
