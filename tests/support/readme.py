"""README.md as a reader types it: its commands and snippets in order, with what makes a long one short."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Piece:
    """One command line, or one snippet of Python."""

    kind: str
    text: str

    def __str__(self) -> str:  # names the test
        return self.text.strip().splitlines()[0][:60]


def pieces(text: str) -> list[Piece]:
    """Everything between fences, in order: one piece for each command of a shell block, one for each Python block."""
    found = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append(Piece("python", body))
        elif language in ("", "sh", "bash"):
            lines = (line.split("  #")[0].strip() for line in body.replace("\\\n", " ").splitlines())
            found += [Piece("shell", part.strip()) for line in lines for part in line.split("&&") if part.strip()]
        else:
            raise ValueError(f"README has a block of {language!r}; teach tests/support/readme.py to run it")
    return found


#: Options that come after the line's own and make it short; the later one wins.
SHORT = {
    "compare": "--examples 1 --methods sink_recent,razor_attention",
    "train": "--steps 3 --batch 2 --dim 16",
    "bench recall": "--steps 2 --length 24 --pairs 3 --vocabulary 32 --only softmax --rates 1e-2",
}
#: For the test that takes its time: the methods and networks are those that the lines name.
LONG = {**SHORT, "train": "--steps 60", "compare": "--examples 3"}


def shortened(arguments: list[str], table: dict[str, str]) -> list[str]:
    """The arguments of a `foveate` command, with the options of its entry in `table` after them."""
    for name, options in table.items():
        if " ".join(arguments).startswith(f"{name} ") or " ".join(arguments) == name:
            own = shlex.split(options)
            return [*arguments, *own]
    return arguments
