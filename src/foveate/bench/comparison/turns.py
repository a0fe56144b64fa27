"""Methods take turns: each prompt goes round all of them before the next one, with the baseline's time beside theirs.

What the machine does meanwhile hits all methods alike, since it is the same few seconds for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan
from typing import Any, Protocol

from transformers import PreTrainedModel

from foveate.bench.comparison.lanes import Lane, briefly
from foveate.bench.comparison.measure import Batch, Said, answer, memory
from foveate.bench.comparison.question import Question
from foveate.bench.known import FULL
from foveate.bench.parts import digest
from foveate.bench.parts.journal import Journal


class Progress(Protocol):
    """Where progress goes."""

    def start(self, total: int) -> None: ...
    def advance(self, label: str) -> None: ...
    def say(self, label: str) -> None: ...


class Turns:
    """Runs what the journal does not have yet, and writes it down prompt by prompt.

    Args:
        model: a decoder.
        world: the digest of the model and of everything else that is the same for all answers.
        journal: what is known, and where what is measured goes.
        watch: told about every answer.
    """

    def __init__(self, model: PreTrainedModel, world: str, journal: Journal, watch: Progress) -> None:
        self.model, self.world, self.journal, self.watch = model, world, journal, watch

    def run(self, lanes: Sequence[Lane], question: Question) -> None:
        """Fill the lanes.

        Raises:
            KeyboardInterrupt: with how many answers are known, and how many there are to be.
        """
        able = [lane for lane in lanes if not lane.given_up]
        total = len(able) * len(question.prompts)
        self._recall(able, question.batches)
        self.watch.start(total - _known(able))
        try:
            for number, batch in enumerate(question.batches):
                todo = [lane for lane in able if not all(place in lane.records for place in batch.places)]
                if todo:
                    self._turn(_rotated(_with_baseline(todo, able), number), todo, batch)
            for lane in able:
                if lane.records:
                    self.watch.say(f"{lane.contender.key}: memory")
                    lane.megabytes = self._weigh(lane, question.heaviest)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_known(able), total) from None

    def _recall(self, lanes: Sequence[Lane], batches: Sequence[Batch]) -> None:
        """Take over what the journal knows."""
        for lane in lanes:
            for batch in batches:
                for index, place in enumerate(batch.places):
                    found = self.journal.get(self._key(lane, batch, index))
                    if found is not None:
                        lane.records[place] = found

    def _turn(self, order: list[Lane], todo: list[Lane], batch: Batch) -> None:
        """One batch under every lane; written down when all have had it."""
        said: dict[str, Said] = {}
        for lane in order:
            found = self._attempt(lane, batch)
            if found is not None:
                said[lane.contender.key] = found
            if lane in todo:
                for _ in batch.places:
                    self.watch.advance(lane.contender.key)
        base, new = said.get(FULL), {}
        for lane in todo:
            if lane.contender.key in said:
                for index, place in enumerate(batch.places):
                    lane.records[place] = _record(said[lane.contender.key], base, index)
                    new[self._key(lane, batch, index)] = lane.records[place]
        self.journal.add(new)

    def _attempt(self, lane: Lane, batch: Batch) -> Said | None:
        """What the lane's method says; None with a reason where it cannot. A method that never could is given up."""
        reason = lane.given_up or _refused(lane, batch)
        if not reason:
            try:
                lane.warm_up(self.model, batch)
                return answer(self.model, lane.contender.at(batch.length), batch)
            except Exception as error:  # noqa: BLE001  one method that fails is a line of the table, not its end
                reason = briefly(error)
                lane.given_up = "" if lane.records else reason
        lane.errors |= dict.fromkeys(batch.places, reason)
        return None

    def _weigh(self, lane: Lane, batch: Batch) -> list[float]:
        """The memory that a method takes, on the same prompt for all."""
        key = digest.of(self.world, lane.contender.identity, batch.identity, "memory")
        known = self.journal.get(key)
        if known is not None:
            return [nan if value is None else value for value in known["megabytes"]]
        try:
            found = memory(self.model, lane.contender.at(batch.length), batch)
        except Exception:  # noqa: BLE001  a method whose memory cannot be counted has its other figures all the same
            found = [nan] * 3
        self.journal.add({key: {"megabytes": [_plain(value) for value in found]}})
        return found

    def _key(self, lane: Lane, batch: Batch, index: int) -> str:
        return digest.of(self.world, lane.contender.identity, batch.identity, index)


def _known(lanes: Sequence[Lane]) -> int:
    return sum(len(lane.records) for lane in lanes)


def _refused(lane: Lane, batch: Batch) -> str:
    """Why the full cache does not read this batch. Other methods may: many stream over any length."""
    prompt = batch.beyond
    if lane.contender.key != FULL or prompt is None:
        return ""
    taken = f"{prompt.ids.shape[1]} + {prompt.new_tokens}"
    return f"the prompt and its answer take {taken} tokens; the model's context holds {prompt.context}"


def _with_baseline(todo: list[Lane], lanes: Sequence[Lane]) -> list[Lane]:
    """Whoever has to run, and the full cache beside them, for times that can be compared."""
    return todo + [lane for lane in lanes if lane.contender.key == FULL and lane not in todo]


def _rotated(lanes: list[Lane], by: int) -> list[Lane]:
    """Another one begins each time, so that nobody is always the one who finds warm or cold caches."""
    cut = by % len(lanes)
    return lanes[cut:] + lanes[:cut]


def _record(said: Said, base: Said | None, index: int) -> dict[str, Any]:
    return {
        "ids": said.ids[index],
        "loss": None if said.losses is None else _plain(said.losses[index]),
        "cache_kept": said.kept,
        "keys_read": said.read,
        "prefill_ms": said.prefill_ms,
        "decode_ms": _plain(said.decode_ms),
        "base_prefill_ms": None if base is None else base.prefill_ms,
        "base_decode_ms": None if base is None else _plain(base.decode_ms),
    }


def _plain(value: float) -> float | None:
    return value if isfinite(value) else None
