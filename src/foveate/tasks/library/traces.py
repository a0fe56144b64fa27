"""A long written-out computation: the model runs a program line by line, and its trace is measured too."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask

_SHOWN, _HIGHEST = 5, 60
_INTRO = "Run each program line by line. Write every line with its value, then the result.\n\n"


@dataclass(frozen=True)
class Traces(TokenTask):
    """A program of sums and differences, whose values the model writes out line by line, and its last value.

    Every line takes one of the six newest variables, so that a wrong value usually spoils the result. The score is 1.0
    for the right result. The number of tokens up to the end of the trace is reported beside it: methods that lose
    tokens often write longer traces. The model may write a quarter more tokens than the right trace has.

    Args:
        length, count, seed, tokens: see `TokenTask`; two short programs, the program and its trace fill `length`.
    """

    length: int = 1024
    name = "trace"
    metric: ClassVar[str] = "trace"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        shown = "".join(self._shown(draw) for _ in range(2))
        lines, traced, result = _program(draw, size + _SHOWN)
        context = f"{_INTRO}{shown}Program:\n{lines}\n"
        prompt = f"{context}Trace:\n"
        answer = f"{traced}\nResult: {result}\n\n"
        spans = {"context": (0, len(context)), "question": (len(context), len(prompt))}
        tokens = self.tokens.count(answer)
        return [
            Example(
                prompt, answer, spans, (str(result),), rule=self.metric, new_tokens=tokens + tokens // 4,
                stop=("\n\n",),
            )
        ]  # fmt: skip

    def _shown(self, draw: random.Random) -> str:
        lines, traced, result = _program(draw, _SHOWN)
        return f"Program:\n{lines}\nTrace:\n{traced}\nResult: {result}\n\n"


def _program(draw: random.Random, size: int) -> tuple[str, str, int]:
    """Return a program of `size` lines, its trace, and its last value; all values are from 1 to 60."""
    names = [
        letter + (str(number) if number else "")
        for number in range(-(-size // 26))
        for letter in string.ascii_lowercase
    ]
    values = [draw.randint(2, 20)]
    lines, traced = [f"a = {values[0]}"], [f"a = {values[0]}"]
    for at in range(1, size):
        source = draw.randrange(max(0, at - 6), at)
        value, step = values[source], draw.randint(1, 9)
        sign = -1 if value + step > _HIGHEST or (value > step and draw.random() < 0.5) else 1
        values.append(value + sign * step)
        symbol = "+" if sign > 0 else "-"
        lines.append(f"{names[at]} = {names[source]} {symbol} {step}")
        traced.append(f"{names[at]} = {value} {symbol} {step} = {values[-1]}")
    return "\n".join(lines), "\n".join(traced), values[-1]
