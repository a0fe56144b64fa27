"""The base class of objectives: a model and a batch in, a loss and its parts out."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.checked import Checked
from foveate.core.errors import OptionError, shown

#: Makes a scalar, the mean over the examples, of a model's logits and the targets.
Criterion = Callable[..., Tensor]
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """A loss to minimise.

    Args:
        total: the scalar whose gradient trains the model.
        parts: its parts by name, without a gradient, for logs. They add up to the total; a loss of one part has none.
        outputs: the model's outputs on the clean batch, if the objective computed them.
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    outputs: Any = None

    @classmethod
    def of(cls, outputs: Any = None, **parts: Float[Tensor, ""]) -> Self:
        """Return the sum of some parts."""
        total = reduce(operator.add, parts.values())
        return cls(total, {name: part.detach() for name, part in parts.items()}, outputs)


class Objective(Checked, ABC):
    """A way to train a model: a callable on the model and a batch.

    It keeps no state between calls but its options and a random generator, and adds no parameters to the model. It runs
    in a plain loop, in Hugging Face's `Trainer` and in Lightning: see `foveate.train.loop.trainers`.

    Attributes:
        criterion: the loss of logits and targets for which the model is trained.
    """

    def __init__(self, criterion: Criterion = F.cross_entropy) -> None:
        if not callable(criterion):
            raise OptionError(f"criterion={shown(criterion)} must be a function of logits and targets")
        self.criterion = criterion

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch.

        Args:
            model: the model in training mode; its parameters get gradients when the total is differentiated.
            batch: the inputs of the model by name, and its targets under "labels".

        Raises:
            OptionError: the batch lacks what the objective needs.
        """

    def plain(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch for evaluation: the criterion alone, on the batch as it is."""
        outputs = model(**inputs_of(batch))
        return Loss(self.criterion(logits_of(outputs), labels_of(batch)), outputs=outputs)

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Batch]:
        """Make an objective in which the mechanism has an effect, a small model and a batch; tests run them."""
        raise NotImplementedError(f"{cls.__name__} has to define example")


def inputs_of(batch: Batch) -> dict[str, Any]:
    """Return a batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch.

    Raises:
        OptionError: it has none.
    """
    if "labels" not in batch:
        raise OptionError(f'batch must hold the targets under "labels"; it holds {", ".join(batch) or "nothing"}')
    return batch["labels"]


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a model's outputs: a tensor, or an object with `logits`."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise OptionError(f"the model must return logits, or an object with logits; got {type(outputs).__name__}")
    return logits
