"""The next-token loss after a context of a given number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.tokens import CHARACTERS, Tokens
from foveate.tasks.parts.corpus import text
from foveate.tasks.parts.library import functions


@dataclass(frozen=True)
class LongText(Task):
    """`length` tokens of the Python manual and of documentation, and the `horizon` tokens after them as the answer.

    The examples are adjacent stretches and share no text. The score is the mean loss of the answer's tokens. A stretch
    is cut out of the tokens of the whole text, so that a prompt may have a token more or less when it is encoded alone.

    Args:
        length: tokens of the prompt.
        count: how many examples.
        horizon: tokens of the answer.
        seed: decides where the first stretch begins.
        tokens: the tokens that `length` counts.
    """

    length: int = 4096
    count: int = 2
    horizon: int = 128
    seed: int = 0
    tokens: Tokens = field(default=CHARACTERS, compare=False, repr=False)
    metric: ClassVar[str] = LOSS

    def __post_init__(self) -> None:
        for option in ("length", "count", "horizon"):
            validate.count(option, getattr(self, option), 1)

    @property
    def name(self) -> str:
        return f"loss_{self.length // 1024}k" if self.length % 1024 == 0 else f"loss_{self.length}"

    def sized(self, tokens: Tokens) -> Self:
        return replace(self, tokens=tokens)

    def examples(self) -> list[Example]:
        whole = self.length + self.horizon
        source = text("heldout")
        if len(source) < 8 * self.count * whole:
            source += "\n\n" + "\n\n".join(function.document for function in functions())
        ids = self.tokens.encode(source)
        spare = len(ids) - self.count * whole
        if spare < 0:
            raise OptionError(f"count={self.count} examples of {whole} tokens must fit the text's {len(ids)}")
        first, decode = self.seed * 9973 % (spare + 1), self.tokens.decode
        starts = [first + index * whole for index in range(self.count)]
        return [
            Example(decode(ids[at : at + self.length]), decode(ids[at + self.length : at + whole])) for at in starts
        ]
