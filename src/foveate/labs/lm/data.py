"""What the lab language model learns from: real text with something in it worth looking back for.

Retrieval grows out of copying heads, and those grow only where copying pays. So half of each batch carries random
strings that are repeated later, and the other half carries the needle task's facts with questions among the text.
"""

from __future__ import annotations

import random
import string

import torch
from torch import Tensor

from foveate.models.base.byte_tokenizer import BOS
from foveate.tasks.parts.corpus import text
from foveate.tasks.text.needle import NAMES, fact, question, snap

_ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_letters + string.digits, string.ascii_uppercase)
_ANSWER_WEIGHT = 4.0


def batch(draw: random.Random, size: int, length: int) -> tuple[Tensor, Tensor]:
    """`size` sequences of `length` tokens (BOS first): `(ids, weights)`, both `(size, length)`.

    `weights` is each token's weight in the loss: more than 1 on the digits that answer a question.
    """
    rows = [(_with_copies if index % 2 else _with_needles)(draw, length - 1) for index in range(size)]
    ids = torch.tensor([[BOS, *body.encode()] for body, _ in rows])
    weights = torch.tensor([[0.0, *weight] for _, weight in rows])
    return ids, weights


def _passage(draw: random.Random, length: int) -> str:
    source = text("train")
    start = draw.randrange(len(source) - length)
    return source[start : start + length]


def _with_copies(draw: random.Random, length: int) -> tuple[str, list[float]]:
    """Text in which random strings stand two to four times."""
    inserts, room = [], length // 2
    while room > 0:
        word = "".join(draw.choices(draw.choice(_ALPHABETS), k=draw.randint(4, 32)))
        times = draw.randint(2, 4)
        inserts += [f" {word} "] * times
        room -= times * (len(word) + 2)
    draw.shuffle(inserts)
    body = _passage(draw, length)
    cuts = sorted(draw.randrange(length // 2) for _ in inserts)
    pieces, last = [], 0
    for cut, insert in zip(cuts, inserts, strict=True):
        pieces += [body[last:cut], insert]
        last = cut
    return "".join([*pieces, body[last:]])[:length], [1.0] * length


def _with_needles(draw: random.Random, length: int) -> tuple[str, list[float]]:
    """Text with facts in its first three quarters and questions about them after that, the last one at the very end."""
    names = draw.sample(NAMES, draw.randint(1, 5))
    if draw.random() < 0.5:  # made-up names, so that it is the look-up that is learnt and not the list of names
        names = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 8))) for _ in names]
    digits = ["".join(draw.choices(string.digits, k=draw.randint(3, 7))) for _ in names]
    facts = [fact(*pair) for pair in zip(names, digits, strict=True)]
    asked = list(range(len(names)))
    draw.shuffle(asked)
    while sum(len(facts[i]) for i in asked) * 2 > length - 64:
        asked.pop()
    facts = [facts[i] for i in asked]
    names, digits = [names[i] for i in asked], [digits[i] for i in asked]
    room = length - 2 * sum(map(len, facts))
    filler = _passage(draw, room)
    split = int(room * draw.uniform(0.5, 0.95))
    events = sorted([(snap(filler, draw.randrange(split)), "fact", i) for i in range(len(facts))])
    late = sorted(snap(filler, draw.randrange(split, room)) for _ in facts)
    late[-1] = room
    events += [(cut, "question", i) for cut, i in zip(late, draw.sample(range(len(facts)), len(facts)), strict=True)]
    body, weights, last = "", [], 0
    for cut, kind, i in events:
        body += filler[last:cut]
        weights += [1.0] * (cut - last)
        last = cut
        if kind == "fact":
            body, weights = body + facts[i], weights + [1.0] * len(facts[i])
        else:
            asked_text, answer = question(names[i]), f" {digits[i]}."
            body += asked_text + answer
            weights += [1.0] * (len(asked_text) + 1) + [_ANSWER_WEIGHT] * len(digits[i]) + [1.0]
    body, weights = body + filler[last:], weights + [1.0] * (room - last)
    return body[:length], weights[:length]
