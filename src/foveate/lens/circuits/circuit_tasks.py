"""Prompts of tasks with counterfactuals: indirect objects, coloured objects, and retrieval.

Each prompt has a counterfactual of the same form, whose answer is the prompt's distractor. The forms of
the first two are those of Circuit Component Reuse Across Tasks in Transformer Language Models (2023), arXiv 2310.08744;
wording and word lists are this project's own, and their answers begin with a space.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import final

from foveate.core import validate
from foveate.tasks.parts.haystack import NAMES, hidden
from foveate.tasks.text.needle import fact, question

_NAMES = ("Mary", "John", "Anna", "Tom", "Lisa", "Paul", "Sarah", "Mark", "Laura", "James", "Alice", "Peter")
_PLACES = ("store", "park", "school", "office", "station", "beach")
_GIFTS = ("drink", "book", "ring", "ticket", "letter", "present")
_THINGS = ("pen", "cup", "plate", "ball", "bowl", "bottle", "notebook", "pencil", "mug", "envelope", "puzzle", "hat")
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
_SURFACES = ("table", "desk", "floor")


@final
@dataclass(frozen=True)
class TaskPrompt:
    """A prompt and its counterfactual.

    Args:
        clean: the prompt; `answer` is the word that follows.
        corrupt: the same form with another answer, which is `distractor`.
    """

    clean: str
    corrupt: str
    answer: str
    distractor: str


def indirect_object_prompts(count: int, seed: int = 0) -> list[TaskPrompt]:
    """Return prompts such as "When Mary and John went to the park, John gave a book to", answered by " Mary".

    The counterfactual exchanges the giver and the receiver.
    """
    validate.count("count", count, 1)
    draw, prompts = random.Random(seed), []
    for _ in range(count):
        first, second = draw.sample(_NAMES, 2)
        place, gift = draw.choice(_PLACES), draw.choice(_GIFTS)
        giver, other = draw.sample((first, second), 2)
        texts = [f"When {first} and {second} went to the {place}, {who} gave a {gift} to" for who in (giver, other)]
        prompts.append(TaskPrompt(texts[0], texts[1], f" {other}", f" {giver}"))
    return prompts


def coloured_object_prompts(count: int, seed: int = 0) -> list[TaskPrompt]:
    """Return a solved question and an open one about the colour of one of three objects, such as " Blue".

    The counterfactual asks about another of the three.
    """
    validate.count("count", count, 1)
    draw, prompts = random.Random(seed), []
    for _ in range(count):
        shown, asked = _scene(draw), _scene(draw)
        example = f"{_question(shown, draw.choice(_SURFACES), 0)} {shown[0][1].capitalize()}\n\n"
        wanted, other = draw.sample(range(3), 2)
        surface = draw.choice(_SURFACES)
        clean, corrupt = (example + _question(asked, surface, number) for number in (wanted, other))
        colours = [f" {colour.capitalize()}" for _, colour in asked]
        prompts.append(TaskPrompt(clean, corrupt, colours[wanted], colours[other]))
    return prompts


def retrieval_prompts(count: int, length: int = 384, seed: int = 0) -> list[TaskPrompt]:
    """Return texts with two facts about pass keys, and the question for one of them: its first digit is the answer.

    The counterfactual exchanges the two names in the facts. Names have equally many letters, and keys other first
    digits, so that the texts differ in the letters of the names alone. They end in a blank.

    Args:
        count: how many.
        length: characters of a prompt, most of them of real text, see `foveate.tasks.Needle`.
        seed: of names, digits, places and text.
    """
    validate.count("count", count, 1)
    validate.count("length", length, 192)
    draw, prompts = random.Random(seed), []
    names = [[name for name in NAMES if len(name) == letters] for letters in (5, 6)]
    for _ in range(count):
        asked, other = draw.sample(draw.choice(names), 2)
        keys = [first + "".join(draw.choices("0123456789", k=4)) for first in draw.sample("0123456789", 2)]
        facts, end = [fact(asked, keys[0]), fact(other, keys[1])], f"{question(asked)} "
        body, spans = hidden(draw, facts, length - sum(map(len, facts)) - len(end))
        exchanged = body
        for (start, stop), new in zip(spans, (fact(other, keys[0]), fact(asked, keys[1])), strict=True):
            exchanged = exchanged[:start] + new + exchanged[stop:]
        prompts.append(TaskPrompt(body + end, exchanged + end, keys[0][0], keys[1][0]))
    return prompts


def _scene(draw: random.Random) -> list[tuple[str, str]]:
    """Return three objects with their colours, in random order."""
    return list(zip(draw.sample(_THINGS, 3), draw.sample(_COLOURS, 3), strict=True))


def _question(scene: list[tuple[str, str]], surface: str, number: int) -> str:
    items = [f"{'an' if colour[0] == 'o' else 'a'} {colour} {thing}" for thing, colour in scene]
    listed = f"{items[0]}, {items[1]}, and {items[2]}"
    return f"Q: On the {surface}, there is {listed}. What color is the {scene[number][0]}?\nA:"
