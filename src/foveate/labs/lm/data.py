"""Training data of the lab language model: real text with content that later text refers back to.

Retrieval develops from copying heads, and those develop only if copying lowers the loss. So half of each batch contains
random strings that occur again later, and the other half contains the needle task's facts and questions about them.
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
    """Draw `size` sequences of `length` tokens (BOS first): `(ids, weights)`, both `(size, length)`.

    `weights` are the tokens' weights in the loss: above 1 on the digits that answer a question.
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
    """Draw text in which random strings occur two to four times."""
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
    """Draw text with facts first and questions about them after that; the last question is at the end."""
    names = draw.sample(NAMES, draw.randint(1, 5))
    if draw.random() < 0.5:  # random names, so that the model learns to look up any name and not a fixed list
        names = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 8))) for _ in names]
    digits = ["".join(draw.choices(string.digits, k=draw.randint(3, 7))) for _ in names]
    facts = [fact(*pair) for pair in zip(names, digits, strict=True)]
    order = list(range(len(names)))
    draw.shuffle(order)
    while sum(len(facts[i]) for i in order) * 2 > length - 64:
        order.pop()
    facts = [facts[i] for i in order]
    names, digits = [names[i] for i in order], [digits[i] for i in order]
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
            query, answer = question(names[i]), f" {digits[i]}."
            body += query + answer
            weights += [1.0] * (len(query) + 1) + [_ANSWER_WEIGHT] * len(digits[i]) + [1.0]
    body, weights = body + filler[last:], weights + [1.0] * (room - last)
    return body[:length], weights[:length]
