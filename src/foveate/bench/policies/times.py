"""Times and memory: all policies run in each round, and every ratio is between runs of the same round.

The prefill is timed with the policy applied from the first token. Decoding is timed after a prefill that most policies
share, which makes many rounds affordable. Live memory is the memory of all tensors beyond those that existed before:
the cache and all else that a policy holds, without garbage.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.bench.known import FULL, own_tokens
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.parts.timing import now
from foveate.bench.policies.model_run import ModelRun
from foveate.bench.policies.shared_prefill import Decoded, Prefilled, decode, live_bytes, prefill
from foveate.host import apply

#: Rounds in which the prefill is timed.
PREFILL_ROUNDS = 2


def time_steps(run: ModelRun) -> int:
    """Return the number of rounds."""
    return len(run.plan.times) * (run.plan.rounds + PREFILL_ROUNDS)


def measure_times(run: ModelRun) -> None:
    """Record every round that the journal does not have; a round is measured as a whole."""
    for tokens in run.plan.times:
        ids, prefilled = run.text(tokens), None
        for number in range(PREFILL_ROUNDS):
            readers = [c for c in run.working() if c.key == FULL or c.budget == run.plan.typical]
            if any(run.known(c, *time_key("read", ids, number)) is None for c in readers):
                prefilled = prefilled or prefill(run.model, ids)  # so that no timed call is the first of its length
                _prefill_round(run, _rotated(readers, number), ids, number)
            run.progress.advance(f"reading {tokens} tokens, round {number + 1}")
        for number in range(run.plan.rounds):
            order = _rotated(run.working(), number)
            if any(run.known(c, *time_key("decode", ids, number, run.plan.steps)) is None for c in order):
                prefilled = prefilled or prefill(run.model, ids)
                _decode_round(run, order, prefilled, number)
            run.progress.advance(f"decoding after {tokens} tokens, round {number + 1}")


def time_key(kind: str, ids: Tensor, number: int, *more: int) -> tuple[Any, ...]:
    """Return what identifies one round's record."""
    return kind, digest.of(ids.tolist()), number, *more


def _rotated(contenders: list[Contender], by: int) -> list[Contender]:
    """Rotate the order, so that each round starts with another contender."""
    cut = by * 7 % len(contenders)
    return contenders[cut:] + contenders[:cut]


@torch.inference_mode()
def _prefill_round(run: ModelRun, order: list[Contender], ids: Tensor, number: int) -> None:
    found = {}
    for contender in order:
        record = run.attempt(contender, lambda: _time_prefill(run, contender, ids))  # noqa: B023
        if record is not None:
            found[run.key(contender, *time_key("read", ids, number))] = record
    run.journal.add(found)


def _time_prefill(run: ModelRun, contender: Contender, ids: Tensor) -> dict[str, Any]:
    methods, before = contender.at(ids.shape[1]), live_bytes(run.model.device)
    cache = DynamicCache(config=run.model.config)
    with apply(run.model, *methods) as applied:
        start = now(run.model.device)
        run.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = now(run.model.device) - start
        return {
            "ms": [1e3 * seconds],
            "live": live_bytes(run.model.device) - before,
            "bytes": applied.stats.cache_bytes,
        }


def _decode(run: ModelRun, contender: Contender, prefilled: Prefilled, number: int) -> Decoded:
    return decode(
        run.model, contender.at(prefilled.ids.shape[1]), prefilled, run.plan.steps + 1, count_memory=number == 0,
        own=own_tokens(contender.key),
    )  # fmt: skip


@torch.inference_mode()
def _decode_round(run: ModelRun, order: list[Contender], prefilled: Prefilled, number: int) -> None:
    found: dict[Any, Any] = {}
    for contender in order:
        decoded = run.attempt(contender, partial(_decode, run, contender, prefilled, number))
        if decoded is not None:
            key = run.key(contender, *time_key("decode", prefilled.ids, number, run.plan.steps))
            found[key] = {
                "ms": [round(1e3 * second, 3) for second in decoded.seconds[1:]],
                "bytes": decoded.bytes, "live": decoded.live, "kept": decoded.kept, "read": decoded.read,
            }  # fmt: skip
    run.journal.add(found)
