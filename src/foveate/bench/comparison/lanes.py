"""One method's way through a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from transformers import PreTrainedModel

from foveate.bench.comparison.measure import Batch, answer
from foveate.bench.methods import Contender, Lessons
from foveate.core.errors import FoveateError

_TRIED = 2  # tokens of a warm-up


@dataclass
class Lane:
    """The answers of a method so far, by the place of the prompt, and its errors.

    Attributes:
        records: what is known of each answer, as the journal has it.
        errors: why there is none.
        megabytes: alive after the prompt, after the answer, and at most.
        given_up: why nothing more is tried.
    """

    contender: Contender
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    megabytes: list[float] | None = None
    given_up: str = ""
    _warm: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, contender: Contender, learnt: Lessons) -> Self:
        """The lane of a method, which is given up at once where it cannot learn what it needs about the model."""
        made = cls(contender)
        try:
            made.contender.learn(learnt)
        except Exception as error:  # noqa: BLE001  one method that fails is a line of the table, not its end
            made.given_up = briefly(error)
        return made

    def warm_up(self, model: PreTrainedModel, batch: Batch) -> None:
        """Run once, briefly, at each order of length, so that no time has a first call in it."""
        order = (len(batch.prompts) * batch.ids.shape[1]).bit_length()
        if order not in self._warm:
            answer(model, self.contender.at(batch.length), batch, min(_TRIED, batch.steps))
            self._warm.add(order)


def briefly(error: BaseException) -> str:
    """An exception as one line; what is no refusal of ours says its type."""
    text = " ".join(str(error).split())
    if isinstance(error, FoveateError):
        return text
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
