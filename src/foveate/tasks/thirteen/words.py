"""RULER's two tasks of frequent words, `cwe` and `fwe` (arXiv 2404.06654)."""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar

from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask, divided
from foveate.tasks.parts.corpus import text
from foveate.tasks.parts.library import sources

_COMMON, _SHORT = 10, 4096  # words to find; below this length RULER repeats less
_CWE_TOKENS, _FWE_TOKENS = 120, 50
_ALPHA = 2.0
_LETTERS, _TOKENS_PER_WORD = 6, 50


@dataclass(frozen=True)
class CommonWords(TokenTask):
    """The ten words of a numbered list that occur 30 times each, where all others occur 3 times (`cwe`).

    Under 4096 tokens, and where that many words do not fit, they occur 6 times and once. A worked example with a short
    list comes first, as in RULER. The words are those of the Python manual and of the library's sources, and the
    wording is ours, so that it is not a RULER score.
    """

    name = "ruler/cwe"
    metric: ClassVar[str] = "ruler-all"

    @cached_property
    def _is_short(self) -> bool:
        if self.length < _SHORT:
            return True
        prompt = self._repeated(random.Random(0), 1, False)[0].prompt
        return self.tokens.count(prompt) + _CWE_TOKENS > 0.9 * self.length

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        return self._repeated(draw, size, self._is_short)

    def _repeated(self, draw: random.Random, size: int, short: bool) -> list[Example]:
        shown, found = _list(draw, *((20, 3, 1) if short else (40, 10, 3)))
        body, answers = _list(draw, size + _COMMON, *((6, 1) if short else (30, 3)))
        context = f"{_INTRO}{shown}{_QUESTION} {_numbered(found)}\n{_INTRO}{body}"
        found_all = Example(
            context + _QUESTION, f" {_numbered(answers)}", {}, tuple(answers), rule=self.metric, new_tokens=_CWE_TOKENS
        )
        return [
            replace(found_all, spans={"context": (0, len(context)), "question": (len(context), len(found_all.prompt))})
        ]


_INTRO = "Below is a list of words with numbers. Some words occur more often than others.\n"
_QUESTION = "\nQuestion: Which 10 words of the list occur most often? Answer: The 10 most frequent words are:"


@dataclass(frozen=True)
class FrequentWords(TokenTask):
    """The three most frequent words of random letters, whose frequencies fall with the square of their rank (`fwe`).

    As in RULER, the most frequent word is `...`, which does not count, and there are as many different words as a 50th
    of the tokens. The wording is ours, so that it is not a RULER score.
    """

    name = "ruler/fwe"
    metric: ClassVar[str] = "ruler-all"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        kinds = max(4, (self.length - _FWE_TOKENS) // _TOKENS_PER_WORD)
        words = ["...", *(_coded(draw) for _ in range(kinds - 1))]
        total = 4 * size / (math.pi**2 / 6)  # the sum of all frequencies 1 / rank ** 2
        text = [word for rank, word in enumerate(words, 1) for _ in range(int(total * rank**-_ALPHA))]
        draw.shuffle(text)
        answers = words[1:4]
        context = f"Count how often each coded word occurs in this text. {' '.join(text)}"
        question = (
            "\nQuestion: Which three words are most frequent in the text, without the dots?"
            " Answer: The three most frequent words are:"
        )
        return [divided(context, question, tuple(answers), rule=self.metric, new_tokens=_FWE_TOKENS)]

    def examples(self) -> list[Example]:
        found = super().examples()
        for example in found:
            times = Counter(example.prompt.split())
            others = [times[word] for word in times if len(word) == _LETTERS and word not in example.answers]
            if min(times[answer] for answer in example.answers) <= max(others, default=0):
                raise OptionError(f"length={self.length} must be larger: fwe's words have equal frequencies")
        return found


def _coded(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=_LETTERS))


def _list(draw: random.Random, kinds: int, common: int, others: int) -> tuple[str, list[str]]:
    """Return a numbered list of `kinds` different words, and the ten that occur `common` times."""
    known = _vocabulary()
    words = draw.sample(known, min(kinds, len(known)))
    chosen = words[:_COMMON] * common + words[_COMMON:] * others
    draw.shuffle(chosen)
    return _numbered(chosen), words[:_COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


@cache
def _vocabulary() -> tuple[str, ...]:
    """Return the words of three to ten letters in the manual and in the library's sources, in alphabetical order."""
    texts = [text("heldout"), *(source for _, source in sources())]
    times = Counter(word for each in texts for word in re.findall(r"(?<![\w.])[a-z]{3,10}(?![\w.(])", each))
    return tuple(sorted(word for word, count in times.items() if count > 1))
