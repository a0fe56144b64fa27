"""The examples of the page, with shortened prompts and answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from foveate.bench.comparison.columns import name_of, ordered, percent
from foveate.bench.comparison.results import LOSS, Answer, Comparison, Row
from foveate.pages.text import visible

SHOWN = 4  # examples on the page
HEAD, TAIL, AROUND = 360, 240, 140  # characters kept of a long text: start, end, and on each side of the answer
LEAST_GAP = 80  # the fewest characters that are left out


@dataclass(frozen=True)
class Piece:
    """A part of a text: `plain`, `mark` (the expected answer) or `gap` (the number of characters left out)."""

    kind: str
    text: str


@dataclass(frozen=True)
class Line:
    """One method's answer; `kind` is right, wrong, partly or unscored, and `verdict` describes it."""

    method: str
    output: list[Piece]
    kind: str
    verdict: str


@dataclass(frozen=True)
class Sample:
    """One prompt with every method's answer; `number` counts from 1 in the order of the task."""

    number: int
    length: int
    prompt: list[Piece]
    expected: list[Piece]
    lines: list[Line]


def by_example(comparison: Comparison) -> list[list[tuple[Row, Answer]]]:
    """Group all methods' answers by example, which prompt and expected answer identify."""
    groups: dict[tuple[str, str], list[tuple[Row, Answer]]] = {}
    for row in ordered(comparison):
        for answer in row.answers:
            groups.setdefault((answer.prompt, answer.expected), []).append((row, answer))
    return list(groups.values())


def choose(comparison: Comparison, shown: int = SHOWN) -> list[Sample]:
    """Choose up to `shown` examples, first those on which methods differ, in patterns not shown yet."""
    seen: Counter[tuple[str, ...]] = Counter()
    ranked = []
    for number, pairs in enumerate(by_example(comparison), start=1):
        pattern = tuple(_verdict(comparison, answer)[1] for _, answer in pairs)
        ranked.append((len(set(pattern)) == 1, seen[pattern], number, pairs))
        seen[pattern] += 1
    ranked.sort(key=lambda item: item[:3])
    return [_sample(comparison, number, pairs) for _, _, number, pairs in ranked[:shown]]


def trim(text: str, answer: str = "") -> list[Piece]:
    """Shorten a long `text` in the middle, and keep and mark `answer`.

    The answer is marked only if it occurs once or twice, as a whole word of at least three characters: other
    occurrences may be accidental.
    """
    found = _find(text, answer.strip())
    spans = [(0, HEAD), (len(text) - TAIL, len(text))]
    if found:
        spans.append((found[0] - AROUND, found[1] + AROUND))
    pieces: list[Piece] = []
    done = 0
    for start, stop in sorted(spans):
        start, stop = max(_between_words(text, start), done), _between_words(text, stop)
        if start - done >= LEAST_GAP:
            pieces.append(Piece("gap", f"{start - done:,} characters left out"))
        else:
            start = done
        if start < stop:
            pieces += _marked(text, start, stop, found)
            done = stop
    return pieces


def _between_words(text: str, at: int) -> int:
    """Clip `at` to the text and move it back to the start of a word, if that is near."""
    at = min(max(at, 0), len(text))
    return at if at in (0, len(text)) else max(text.rfind(" ", max(at - 24, 0), at) + 1, 0) or at


def _find(text: str, answer: str) -> tuple[int, int] | None:
    if len(answer) < 3 or len(answer) > HEAD:
        return None
    hits = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text)]
    return hits[-1] if 0 < len(hits) <= 2 else None


def _marked(text: str, start: int, stop: int, found: tuple[int, int] | None) -> list[Piece]:
    """Return `text[start:stop]`, split around `found` if it contains it."""
    if not found or not start <= found[0] < found[1] <= stop:
        return [Piece("plain", visible(text[start:stop], lines=True))]
    cuts = [("plain", start, found[0]), ("mark", *found), ("plain", found[1], stop)]
    return [Piece(kind, visible(text[left:right], lines=True)) for kind, left, right in cuts if left < right]


def _sample(comparison: Comparison, number: int, pairs: list[tuple[Row, Answer]]) -> Sample:
    first = pairs[0][1]
    lines = [
        Line(name_of(comparison, row), trim(answer.error or answer.output), *_verdict(comparison, answer))
        for row, answer in pairs
    ]
    return Sample(number, len(first.prompt), trim(first.prompt, first.expected), trim(first.expected), lines)


def _verdict(comparison: Comparison, answer: Answer) -> tuple[str, str]:
    if answer.error:
        return "wrong", "failed"
    if not math.isfinite(answer.score):
        return "unscored", "not scored"
    if comparison.metric == LOSS:
        return "unscored", f"loss {answer.score:.2f}"
    if answer.score >= 1 - 1e-9:
        return "right", "right"
    return ("wrong", "wrong") if answer.score <= 0 else ("partly", f"partly, {percent(answer.score)}")
