"""Long real text and its continuation: the task that measures the next-token loss at a given length."""

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
    """`length` characters of the Python manual as the prompt, and the `horizon` characters after them as the answer.

    The examples are adjacent stretches and share no text. The score is the mean loss of the answer's tokens.

    Args:
        length: characters of the prompt.
        count: how many examples.
        horizon: characters of the answer.
        seed: decides where the first stretch begins.
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
                f"count={self.count} examples of length={self.length} + horizon={self.horizon} characters must fit the "
                f"text's {len(text('heldout'))}"
            )

    def examples(self) -> list[Example]:
        source, whole = text("heldout"), self.length + self.horizon
        spare = len(source) - self.count * whole
        first = self.seed * 9973 % (spare + 1)
        starts = [first + index * whole for index in range(self.count)]
        return [Example(source[at : at + self.length], source[at + self.length : at + whole]) for at in starts]
