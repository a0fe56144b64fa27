"""Times of the reference run: what a record holds, with a clock made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveate.bench.known import FULL
from foveate.bench.methods import Contender
from foveate.bench.policies import times
from foveate.bench.policies.shared_prefill import prefill
from tests.support.lab import lab, lab_host

IDS = torch.randint(97, 120, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run() -> Any:
    records: dict[str, Any] = {}
    return SimpleNamespace(
        model=lab()[0], plan=SimpleNamespace(steps=3, times=(40, 50), rounds=4), records=records,
        attempt=lambda contender, work: work(), key=lambda contender, *parts: contender.key,
        journal=SimpleNamespace(add=records.update),
    )  # fmt: skip


@torch.inference_mode()
def test_the_time_of_a_prefill_is_between_its_two_readings_of_the_clock(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([100.0, 100.25])
    monkeypatch.setattr(times, "now", lambda device: next(readings))
    record = times._time_prefill(run, Contender(FULL, lab_host(), 1.0), IDS)
    assert record["ms"] == [250.0]
    config = run.model.config
    heads, width = config.num_key_value_heads, config.head_dim
    assert record["bytes"] == 2 * config.num_hidden_layers * heads * width * 40 * 4
    assert record["live"] >= record["bytes"]


def test_a_round_times_the_steps_of_the_plan_after_a_first_token(run: Any) -> None:
    times._decode_round(run, [Contender(FULL, lab_host(), 1.0)], prefill(run.model, IDS), 0)
    (record,) = run.records.values()
    assert len(record["ms"]) == 3 and min(record["ms"]) > 0
    assert (record["kept"], record["read"]) == (1.0, 1.0)
    assert times.time_steps(run) == 2 * (4 + times.PREFILL_ROUNDS)


def test_each_round_begins_with_another_contender() -> None:
    assert [times._rotated(list("abcde"), by)[0] for by in range(5)] == list("acebd")  # type: ignore[type-var]
    assert sorted(times._rotated(list("abcde"), 3)) == list("abcde")  # type: ignore[type-var, arg-type]
