"""The run of a method: warm-ups at new lengths only, calibration that fails, and errors in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveate.bench.comparison import method_run
from foveate.bench.comparison.encoding import Prompt
from foveate.bench.comparison.measure import batches
from foveate.bench.comparison.method_run import MethodRun, one_line
from foveate.core.errors import OptionError
from foveate.tasks.base.task import Example


def test_a_method_warms_up_once_for_each_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[int, int]] = []
    monkeypatch.setattr(method_run, "run_batch", lambda model, methods, batch, steps: warmed.append((methods, steps)))
    contender: Any = SimpleNamespace(at=lambda length: length)
    run, model = MethodRun(contender), SimpleNamespace()
    for lengths, new in (([40], 6), ([60], 6), ([64], 1), ([127], 6), ([40, 40], 6), ([70, 70], 6), ([50], 6)):
        prompts = [Prompt(Example("p", "a"), torch.ones(1, length, dtype=torch.long), new) for length in lengths]
        (batch,) = batches(prompts, len(prompts), None, 0)
        run.warm_up(model, batch)  # type: ignore[arg-type]
    assert warmed == [(40, 2), (64, 1), (70, 2)], "tokens of all prompts together, at most two steps"


def test_a_calibration_that_fails_gives_the_method_up() -> None:
    def fails(store: object) -> None:
        raise OptionError("no\n  weights")

    contender: Any = SimpleNamespace(calibrate=fails)
    assert MethodRun.of(contender, SimpleNamespace()).given_up == "no weights"  # type: ignore[arg-type]
    contender = SimpleNamespace(calibrate=lambda store: None)
    assert MethodRun.of(contender, SimpleNamespace()).given_up == ""  # type: ignore[arg-type]


def test_an_error_is_one_line_with_the_type_of_a_foreign_one() -> None:
    assert one_line(OptionError("a\n b")) == "a b"
    assert one_line(ValueError("a\n b")) == "ValueError: a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 300)) == f"ValueError: {'x' * 200}"
