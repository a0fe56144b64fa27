"""Times and memory: policies take turns, and every ratio is between neighbours in one round.

Reading the prompt is timed with the policy in place from the first token on. Decoding is timed from a reading that
all share, so that many rounds can be afforded. Live memory is what all tensors together take beyond what stood before:
the cache, whatever else a policy holds, and nothing that Python has let go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.bench.known import FULL
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.parts.timing import now
from foveate.bench.policies.desk import Desk
from foveate.bench.policies.shared import Reading, alive, go_on, read
from foveate.host import apply

#: Rounds in which reading the prompt is timed.
READINGS = 2


def steps(desk: Desk) -> int:
    return len(desk.plan.times) * (desk.plan.rounds + READINGS)


def measure(desk: Desk) -> None:
    """Write down every round that the journal does not have; a round is measured as a whole."""
    for tokens in desk.plan.times:
        ids, reading = desk.text(tokens), None
        for number in range(READINGS):
            readers = [c for c in desk.able() if c.key == FULL or c.budget == desk.plan.typical]
            if any(desk.known(c, *what("read", ids, number)) is None for c in readers):
                reading = reading or read(desk.model, ids)  # so that no time has the first call of a length in it
                _read_round(desk, _turned(readers, number), ids, number)
            desk.watch.advance(f"reading {tokens} tokens, round {number + 1}")
        for number in range(desk.plan.rounds):
            turn = _turned(desk.able(), number)
            if any(desk.known(c, *what("decode", ids, number, desk.plan.steps)) is None for c in turn):
                reading = reading or read(desk.model, ids)
                _decode_round(desk, turn, reading, number)
            desk.watch.advance(f"decoding after {tokens} tokens, round {number + 1}")


def what(kind: str, ids: Tensor, number: int, *more: int) -> tuple[Any, ...]:
    return kind, digest.of(ids.tolist()), number, *more


def _turned(contenders: list[Contender], by: int) -> list[Contender]:
    """Another one begins each time."""
    cut = by * 7 % len(contenders)
    return contenders[cut:] + contenders[:cut]


@torch.inference_mode()
def _read_round(desk: Desk, turn: list[Contender], ids: Tensor, number: int) -> None:
    found = {}
    for contender in turn:
        record = desk.attempt(contender, lambda: _read_one(desk, contender, ids))  # noqa: B023
        if record is not None:
            found[desk.key(contender, *what("read", ids, number))] = record
    desk.journal.add(found)


def _read_one(desk: Desk, contender: Contender, ids: Tensor) -> dict[str, Any]:
    methods, before = contender.at(ids.shape[1]), alive(desk.model.device)
    cache = DynamicCache(config=desk.model.config)
    with apply(desk.model, *methods) as run:
        begun = now(desk.model.device)
        desk.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = now(desk.model.device) - begun
        return {
            "ms": [1e3 * seconds],
            "live": alive(desk.model.device) - before,
            "bytes": run.stats.cache_bytes,
        }


@torch.inference_mode()
def _decode_round(desk: Desk, turn: list[Contender], reading: Reading, number: int) -> None:
    found, tokens, new = {}, reading.ids.shape[1], desk.plan.steps + 1
    for contender in turn:
        methods = contender.at(tokens)
        said = desk.attempt(contender, lambda: go_on(desk.model, methods, reading, new, weigh=number == 0))  # noqa: B023
        if said is not None:
            key = desk.key(contender, *what("decode", reading.ids, number, desk.plan.steps))
            found[key] = {
                "ms": [round(1e3 * second, 3) for second in said.seconds[1:]],
                "bytes": said.bytes, "live": said.live, "kept": said.kept, "read": said.read,
            }  # fmt: skip
    desk.journal.add(found)
