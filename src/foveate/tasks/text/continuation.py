"""Long real text and what comes next in it: the task behind the next-token loss at a given length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Example, Task
from foveate.tasks.parts.corpus import text


@dataclass(frozen=True)
class Continuation(Task):
    """`length` characters of the Python manual as the prompt, and the `horizon` characters behind them as the answer.

    The examples are stretches side by side: no text stands in two of them. The measure is the mean loss of the
    answer's tokens.

    Args:
        length: characters of the prompt.
        count: how many examples.
        horizon: characters of the answer.
        seed: which stretch of the text is the first.
    """

    length: int = 16384
    count: int = 2
    horizon: int = 512
    seed: int = 0
    name = "text"
    metric: ClassVar[str] = LOSS

    def __post_init__(self) -> None:
        for option in ("length", "count", "horizon"):
            validate.at_least(option, getattr(self, option), 1)
        if self.count * (self.length + self.horizon) > len(text("heldout")):
            raise OptionError(
                f"count={self.count} stretches of {self.length} + {self.horizon} characters are more than the text's "
                f"{len(text('heldout'))}"
            )

    def examples(self) -> list[Example]:
        source, whole = text("heldout"), self.length + self.horizon
        spare = len(source) - self.count * whole
        first = self.seed * 9973 % (spare + 1)
        starts = [first + index * whole for index in range(self.count)]
        return [Example(source[at : at + self.length], source[at + self.length : at + whole]) for at in starts]
