"""Sentences hidden in real text, for all retrieval tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from foveate.tasks.parts.corpus import text

NAMES = (
    "amber anvil apple arrow badge basil beach birch bison brick cabin camel canoe cedar chalk cloud "
    "coral crane daisy delta ember fable falcon fern flint forge garnet ginger glacier grove harbor hazel "
    "heron indigo ivory jasper juniper kettle lagoon lantern lemon linen lotus magnet maple marble meadow "
    "nectar oasis olive onyx orbit otter pebble pepper plum quartz raven ribbon saffron sierra spruce "
    "summit tulip velvet walnut willow zephyr "
).split()


def hidden(draw: random.Random, sentences: Sequence[str], room: int) -> tuple[str, list[tuple[int, int]]]:
    """Insert each sentence at a random place of `room` characters of real text; return the text and the places."""
    filler = passage(draw, room)
    cuts = sorted((snap(filler, draw.randrange(room)), index) for index in range(len(sentences)))
    return _inserted(filler, sentences, cuts)


def hidden_in_order(draw: random.Random, sentences: Sequence[str], room: int) -> tuple[str, list[tuple[int, int]]]:
    """Insert the sentences as `hidden` does, but in the given order."""
    filler = passage(draw, room)
    cuts = sorted(snap(filler, draw.randrange(room)) for _ in sentences)
    return _inserted(filler, sentences, list(zip(cuts, range(len(sentences)), strict=True)))


def passage(draw: random.Random, room: int) -> str:
    """Return a random stretch of the held-out text, which no model here is trained on."""
    source = text("heldout")
    start = draw.randrange(len(source) - room)
    return source[start : start + room]


def snap(filler: str, cut: int) -> int:
    """Return the nearest blank at or before `cut`, so that a sentence never splits a word."""
    return max(filler.rfind(" ", 0, cut + 1), 0)


def listed(words: Sequence[str]) -> str:
    """Join words as `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _inserted(filler: str, sentences: Sequence[str], cuts: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    pieces, spans, at, last = [], [(0, 0)] * len(sentences), 0, 0
    for cut, index in cuts:
        pieces += [filler[last:cut], sentences[index]]
        at, last = at + cut - last, cut
        spans[index] = (at, at + len(sentences[index]))
        at += len(sentences[index])
    return "".join([*pieces, filler[last:]]), spans
