"""The base class of cache policies: methods that use a given share of a decoder's cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar, Self, TypeVar

from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.method import Method
from foveate.host.probing import Progress

_Item = TypeVar("_Item")


def check_budget(budget: float, length: int) -> None:
    """Refuse a budget that is not in 0..1, and a length that is not a positive whole number."""
    validate.between("budget", budget, 0.0, 1.0)
    validate.count("length", length, 1)


def check_layers(layers: tuple[int, ...] | None, host: Host) -> None:
    """Refuse numbers that are none of a model's layers: a policy on them would change nothing, without a word."""
    known = sorted(layer.layer for layer in layout(host).layers)
    for layer in layers or ():
        if not isinstance(layer, int) or isinstance(layer, bool) or layer not in known:
            raise OptionError(f"layers={shown(layers)}: {shown(layer)} is not among this model's layers {known}")


def calibration_items(data: Iterable[tuple[Tensor, Tensor]], most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first items of calibration data; refuse data without any, after which nothing would be learnt."""
    item = None
    for item in islice(data, most):
        yield item
    if item is None:
        raise OptionError("data must hold at least one item (ids, answers); got none")


def next_item(data: Iterator[_Item], step: int, steps: int) -> _Item:
    """Return the item of one training step; refuse data that ends before the last step."""
    for item in data:
        return item
    raise OptionError(f"data must hold an item for each of the {steps} steps; got {step}")


class Policy(Method):
    """A method that keeps, or reads while decoding, only part of the cache."""

    needs_cache: ClassVar[bool] = True

    #: True if the policy reads few keys of the prompt only, and decoding reads all.
    decodes_densely: ClassVar[bool] = False

    @property
    def tables(self) -> float:
        """Bytes of the policy's own tables beside the cache, as a share of the bytes of the tokens that are stored.

        The budget of a policy that evicts covers them.
        """
        return 0.0

    def bind(self, host: Host) -> None:
        """Refuse models without layers that attend through a cache."""
        layout(host)

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Measure what the policy has to know about a model, once. Most policies measure nothing.

        Args:
            host: the model.
            data: `(ids (B, N), answers (B, N) bool)`, long text with something to retrieve; see
                `foveate.tasks.Passkeys`.
            progress: called as the work advances.

        Returns:
            Named tensors for `at_budget`.
        """
        return {}

    @classmethod
    @abstractmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """Return the policy that keeps (or, if it evicts nothing, reads) about this share of `length` tokens' cache.

        Args:
            budget: in 0..1, of the bytes of a full cache, over all layers and heads.
            host: the model that the policy is for.
            length: expected number of prompt tokens.
            learnt: the result of `calibrate`.
        """

    @classmethod
    def least(cls, host: Host, length: int) -> float:
        """Return the smallest budget of `length` tokens that the policy can meet in a model."""
        return 0.0

    @staticmethod
    def tokens(budget: float, length: int) -> int:
        """Return the budget in tokens, at least one."""
        check_budget(budget, length)
        return max(1, round(budget * length))
