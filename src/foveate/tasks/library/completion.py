"""Code completion: the next line of a module of the standard library."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask
from foveate.tasks.parts.library import sources

_NEW_TOKENS = 64
_NEAR = 12  # lines before the target that belong to the question
_WORD = re.compile(r"[A-Za-z_]\w{7,}")


@dataclass(frozen=True)
class Completion(TokenTask):
    """The next line of code, whose longest identifier last occurs more than twelve lines earlier.

    The score is LongBench's for code: the similarity of the first line that is no comment. The last twelve lines are
    the question, so that a method compresses the code before them without knowing what is asked. A model that was
    trained on the library knows some lines by heart: compare with the full cache, not across models.
    """

    name = "code_completion"
    metric: ClassVar[str] = "code-line"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        lines, target = draw.choice(_targets())
        near, start = target - _NEAR, max(0, target - _NEAR - 4 * size)
        context = "\n".join(lines[start:near]) + "\n"
        question = "\n".join(lines[near:target]) + "\n"
        spans = {"context": (0, len(context)), "question": (len(context), len(context) + len(question))}
        return [Example(context + question, lines[target], spans, rule=self.metric, new_tokens=_NEW_TOKENS)]


@cache
def _targets() -> tuple[tuple[tuple[str, ...], int], ...]:
    """Return modules as lines, with each line whose identifier was last seen far above."""
    found = []
    for _, source in sources():
        lines = tuple(source.split("\n"))
        seen: dict[str, int] = {}
        for at, line in enumerate(lines):
            words = _WORD.findall(line)
            code = line.strip() and not any(mark in line for mark in ("#", '"', "'", "`"))
            if code and at > 150 and 24 <= len(line) <= 90 and words:
                last = seen.get(max(words, key=len), at)
                if _NEAR < at - last < 150 and not line.lstrip().startswith(("def ", "class ", "import ", "from ")):
                    found.append((lines, at))
            seen.update(dict.fromkeys(words, at))
    return tuple(found)
