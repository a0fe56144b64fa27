"""The seam of cache policies: methods that spend a given share of a decoder's cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Self

from torch import Tensor

from foveate.core import validate
from foveate.host import Host
from foveate.host.hf import layout
from foveate.host.method import Method

#: `progress(step, steps, note)`.
Progress = Callable[[int, int, str], None]


def check_budget(budget: float, length: int) -> None:
    """Refuse a share or a number of tokens that is none."""
    validate.between("budget", budget, 0.0, 1.0)
    validate.count("length", length, 1)


class Policy(Method):
    """A method that keeps, or reads while decoding, only part of the cache."""

    needs_cache: ClassVar[bool] = True

    def bind(self, host: Host) -> None:
        """Refuse models without layers that attend through a cache."""
        layout(host)

    @classmethod
    def calibrate(
        cls, host: Host, data: Iterable[tuple[Tensor, Tensor]], progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """What the policy has to learn about a model once, as named tensors for `at_budget`; most learn nothing.

        Args:
            host: the model.
            data: `(ids (B, N), answers (B, N) bool)`, long text with something to retrieve; see
                `foveate.tasks.Passkeys`.
            progress: called as the work goes on.
        """
        return {}

    @classmethod
    @abstractmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """The policy that keeps (or, where it evicts nothing, reads) about this share of a cache of `length` tokens.

        Args:
            budget: in 0..1, of all slots over all layers and heads.
            host: the model it is for.
            length: tokens of the prompts to come.
            learnt: what `calibrate` returned.
        """

    @staticmethod
    def tokens(budget: float, length: int) -> int:
        """The budget in tokens, at least one."""
        check_budget(budget, length)
        return max(1, round(budget * length))
