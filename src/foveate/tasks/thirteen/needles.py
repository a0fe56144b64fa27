"""The eight needle tasks of RULER (arXiv 2404.06654): niah_single_1 to _3, niah_multikey_1 to _3, and two more.

The haystacks are the Python manual instead of essays, one repeated line of words of our own, or other needles. Texts
and instructions are ours, so that scores are not RULER's.
"""

from __future__ import annotations

import random
import re
import uuid
from dataclasses import dataclass
from functools import cache

from foveate.core import validate
from foveate.tasks.base.task import Example
from foveate.tasks.base.token_task import TokenTask
from foveate.tasks.parts.corpus import text
from foveate.tasks.parts.haystack import NAMES

NOISE = "Rain falls. Rivers run. The days go by. Roads bend. We walk out and come home."
_DEPTHS = 40  # even steps from the start of the text to its end
_NEW_TOKENS = 128


@dataclass(frozen=True)
class Kind:
    """The makings of one task: its haystack, its keys, the values of each key, and the keys in the question."""

    haystack: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: str = "words"
    value: str = "number"


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("manual"),
    "niah_single_3": Kind("manual", value="code"),
    "niah_multikey_1": Kind("manual", keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", key="code", value="code"),
    "niah_multivalue": Kind("manual", values=4),
    "niah_multiquery": Kind("manual", keys=4, queries=4),
}


@dataclass(frozen=True)
class Needles(TokenTask):
    """A question about one or several hidden facts `The secret number of KEY is VALUE.`

    Keys are pairs of words or UUIDs, values are numbers of seven digits or UUIDs. The score is RULER's: the share of
    the values that the output contains. The text, the keys and the wording are ours, so that it is not a RULER score.

    Args:
        length, count, seed, tokens: see `TokenTask`; 128 tokens are left to the answer, as in RULER.
        kind: a name of `KINDS`.
    """

    kind: str = "niah_single_1"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("kind", self.kind, tuple(KINDS))

    @property
    def name(self) -> str:
        return f"ruler/{self.kind}"

    @property
    def metric(self) -> str:
        return "ruler-all"

    def _built(self, draw: random.Random, size: int) -> list[Example]:
        kind = KINDS[self.kind]
        keys = [_drawn(draw, kind.key) for _ in range(kind.keys)]
        values = [[_drawn(draw, kind.value) for _ in range(kind.values)] for _ in keys]
        needles = [_needle(kind.value, key, value) for key, own in zip(keys, values, strict=True) for value in own]
        draw.shuffle(needles)
        asked = draw.sample(range(len(keys)), kind.queries)
        answers = tuple(value for index in asked for value in values[index])
        body = _hidden(draw, kind, needles, size)
        intro = f"Remember the secret {kind.value}s in this text. A question about them follows.\n"
        question = _question(kind, [keys[index] for index in asked])
        prompt = intro + body + question
        start = len(intro) + len(body)
        spans = {"context": (0, start), "question": (start, len(prompt))}
        for number, needle in enumerate(n for n in needles if any(answer in n for answer in answers)):
            at = prompt.find(needle)
            spans[f"needle {number}"] = (at, at + len(needle))
        return [Example(prompt, f" {', '.join(answers)}", spans, answers, rule="ruler-all", new_tokens=_NEW_TOKENS)]


def _needle(kind: str, key: str, value: str) -> str:
    return f"The secret {kind} of {key} is {value}."


def _question(kind: Kind, keys: list[str]) -> str:
    """Return the question and the beginning of the answer."""
    several = kind.queries * kind.values > 1
    names = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    noun, verb = (f"{kind.value}s", "are") if several else (kind.value, "is")
    return f"\nWhich secret {noun} of {names} {verb} in the text? The secret {noun} of {names} in the text {verb}"


def _drawn(draw: random.Random, kind: str) -> str:
    if kind == "number":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "code":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return "-".join(draw.sample(NAMES, 2))


def _hidden(draw: random.Random, kind: Kind, needles: list[str], size: int) -> str:
    """Return `size` lines of noise or needles, or `size` times eight words of the manual, with the needles in them."""
    if kind.haystack == "manual":
        sentences = _manual(draw, 8 * size)
        depths = sorted(draw.sample(range(_DEPTHS), len(needles)))
        cuts = [int(len(sentences) * depth / (_DEPTHS - 1)) for depth in depths]
        for cut, needle in sorted(zip(cuts, needles, strict=True), reverse=True):
            sentences.insert(cut, needle)
        return " ".join(sentences)
    lines = [NOISE] * size
    if kind.haystack == "needles":
        lines = [_needle(kind.value, _drawn(draw, kind.key), _drawn(draw, kind.value)) for _ in range(size)]
    for needle in needles:
        lines.insert(draw.randrange(size), needle)
    return "\n".join(lines)


def _manual(draw: random.Random, words: int) -> list[str]:
    """Return sentences of the manual with `words` words, from a random place on; it starts again after its end."""
    source = _words()
    start = draw.randrange(len(source))
    taken = [source[(start + at) % len(source)] for at in range(words)]
    return re.split(r"(?<=[.!?]) ", " ".join(taken))


@cache
def _words() -> tuple[str, ...]:
    return tuple(text("heldout").split())
