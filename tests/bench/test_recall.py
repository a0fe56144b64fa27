"""The recall figure: even networks, honest states, and a run that can be taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.bench import recall as figure
from foveate.bench.recall import CONTENDERS, Point, evened, parameters, recall, spec, state_bytes
from foveate.core.errors import OptionError
from foveate.report import curves
from foveate.tasks.mqar import MQAR
from foveate.train.loop import Schedule

TASK = MQAR(vocabulary=32, length=24, pairs=3)
NAMED = {contender.label: contender for contender in CONTENDERS}


def test_there_are_enough_of_each_kind() -> None:
    assert len(CONTENDERS) >= 10
    assert len(NAMED) == len(CONTENDERS)
    assert {contender.family for contender in CONTENDERS} == set(curves.FAMILIES)
    assert sum(contender.family == "based" for contender in CONTENDERS) >= 3


@pytest.mark.parametrize("label", NAMED)
def test_every_network_has_as_many_parameters(label: str) -> None:
    budget = parameters(spec(NAMED["softmax"], TASK, 64, 2))
    made = evened(spec(NAMED[label], TASK, 64, 2), budget)
    assert abs(parameters(made) - budget) < 0.005 * budget


@pytest.mark.parametrize("label", NAMED)
@torch.no_grad()
def test_a_state_is_counted_after_the_whole_sequence(label: str) -> None:
    """Attention's grows with the sequence, a window's up to the window, all others' not at all."""
    made = spec(NAMED[label], TASK, 32, 2)
    sizes = [state_bytes(made, replace(TASK, length=length)) for length in (48, 64, 80)]
    assert sizes[0] > 0
    if NAMED[label].family == "attention":
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 16 * 2 * (32 + 32) * 4
    else:
        assert sizes[0] == sizes[1] == sizes[2]


def test_the_states_by_hand() -> None:
    """Two layers of two heads, 16 channels each, and three tokens of the convolution's 96 inputs, in four bytes."""
    conv = 2 * 3 * 96
    assert state_bytes(spec(NAMED["softmax"], TASK, 32, 2), TASK) == 4 * (conv + 2 * 24 * 64)
    assert state_bytes(spec(NAMED["window 8"], TASK, 32, 2), TASK) == 4 * (conv + 2 * 8 * 64)
    assert state_bytes(spec(NAMED["lightning"], TASK, 32, 2), TASK) == 4 * (conv + 2 * 2 * 16 * 16)


def test_a_run_can_be_taken_up_again(tmp_path: Path) -> None:
    said, schedule = [], Schedule(steps=3, batch=4)
    first = recall(drill=TASK, schedule=schedule, only=["softmax"], dim=16, out=tmp_path)
    both = recall(
        drill=TASK, schedule=schedule, only=["softmax", "lightning"], dim=16, out=tmp_path,
        progress=lambda *at: said.append(at),
    )  # fmt: skip
    assert [point.label for point in both.points] == ["softmax", "lightning"]
    assert both.points[0] == first.points[0]
    assert {text.partition(":")[0] for _, _, text in said} == {"lightning"}
    assert said[-1][:2] == (3, 3)
    kept = json.loads((tmp_path / figure.RESULTS).read_text())
    assert kept["task"] == {"name": "mqar", **vars(TASK)}
    other = recall(drill=TASK, schedule=replace(schedule, seed=1), only=["softmax"], dim=16, out=tmp_path)
    assert other.points[0].scores != first.points[0].scores or other.points[0].seconds != first.points[0].seconds


def test_unknown_labels(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="only=softmx names no contender; they are softmax, sigmoid"):
        recall(drill=TASK, only=["softmx"], out=tmp_path)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    points = [Point("<b>", "attention", 10, 1000, 0.5, 1.0), Point("two", "based", 10, 500, 0.25, 1.0)]
    page = curves.recall(points, "a <title>", tmp_path / "recall.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<title>a" not in page
    assert "cdn.plot.ly" not in page.partition("plotly.js v")[0]
    assert curves.smooth([1.0] * 50) == pytest.approx([1.0] * 50)
    assert curves.smooth([0.0] * 50 + [1.0] * 50)[-1] > 0.99
