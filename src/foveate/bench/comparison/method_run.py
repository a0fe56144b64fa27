"""The run of one method on a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from transformers import PreTrainedModel

from foveate.bench.comparison.measure import Batch, run_batch
from foveate.bench.comparison.rows import PAIRS
from foveate.bench.known import SHARING
from foveate.bench.methods import Calibrations, Contender
from foveate.core.errors import FoveateError

_WARM_UP = 2  # tokens of a warm-up


@dataclass(eq=False)
class MethodRun:
    """A method's answers so far and its errors, by the index of the prompt.

    Args:
        contender: the method at its budget.
        turn, turns: the number of the budget among those that the method runs at, and how many those are.

    Attributes:
        records: the journal's records of the answers.
        errors: the reason of each missing answer.
        megabytes: live memory after the prompt, after the answer, and the peak.
        agnostic: the journal's records of query-agnostic answers.
        agnostic_error: the reason of a missing query-agnostic answer; empty otherwise.
        given_up: the reason why no more prompts are tried; empty while the method runs.
        warm: the lengths at which the method was run before, as powers of two; its budgets share them.
    """

    contender: Contender
    turn: int = 0
    turns: int = 1
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    megabytes: list[float] | None = None
    given_up: str = ""
    agnostic: dict[int, dict[str, Any]] = field(default_factory=dict)
    agnostic_error: str = ""
    warm: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, contender: Contender, calibrations: Calibrations, turn: int = 0, turns: int = 1) -> Self:
        """Start the run of a method with its calibration; it is given up at once if calibration fails."""
        run = cls(contender, turn, turns)
        try:
            run.contender.calibrate(calibrations)
        except Exception as error:  # noqa: BLE001  a failed method becomes a row with its reason
            run.given_up = one_line(error)
        return run

    @property
    def label(self) -> str:
        """The method, and its budget if there are several."""
        return f"{self.contender.key} at {self.contender.budget:.3g}" if self.turns > 1 else self.contender.key

    def shares(self, number: int, batch: Batch) -> bool:
        """Return whether the method answers the batch of this number after a prompt that was read for several methods.

        It is read once for a method's budgets then. Each budget reads the first few prompts itself, and later ones in
        turn with the others, so that each has times of its own.
        """
        own = number < PAIRS or number % self.turns == self.turn
        return not (own or self.contender.renumber or batch.too_long) and self.contender.key in SHARING

    def warm_up(self, model: PreTrainedModel, batch: Batch) -> None:
        """Run a few tokens at each new power of two of the length, so that no measured call is the first one."""
        order = (len(batch.prompts) * batch.ids.shape[1]).bit_length()
        if order not in self.warm:
            run_batch(model, self.contender.at(batch.length), batch, min(_WARM_UP, batch.steps))
            self.warm.add(order)


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line, with its type if it is not one of Foveate's errors."""
    text = " ".join(str(error).split())
    if isinstance(error, FoveateError):
        return text
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
