"""The recall figure: even networks, honest states, and a run that can be taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.bench import recall_figure as figure
from foveate.bench.recall_figure import CONTENDERS, Point, Recall, evened, parameters, recall, spec, state_bytes
from foveate.core.errors import DivergedError, OptionError
from foveate.report import curves
from foveate.tasks.base.training_task import HELDOUT
from foveate.tasks.training.mqar import MQAR
from foveate.train.loop.loop import Schedule, evaluate, fit

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
    said, settings = [], dict(drill=TASK, schedule=Schedule(steps=3, batch=4), dim=16, out=tmp_path)
    first = recall(**settings, rates=[1e-2], only=["softmax"])
    both = recall(
        **settings, rates=[1e-3, 1e-2], only=["softmax", "lightning"], progress=lambda *at: said.append(at)
    )  # fmt: skip
    runs = [("softmax", 1e-3), ("softmax", 1e-2), ("lightning", 1e-3), ("lightning", 1e-2)]
    assert [(point.label, point.rate) for point in both.points] == runs
    assert both.points[1] == first.points[0]
    made = {f"{label} at {rate:g}" for label, rate in runs} - {"softmax at 0.01"}
    assert {text.partition(":")[0] for *_, text in said} == made
    assert said[-1][:2] == (9, 9)
    kept = json.loads((tmp_path / figure.RESULTS).read_text())
    assert kept["task"] == {"name": "mqar", **vars(TASK)}
    assert {(point.label, point.rate) for point in Recall.load(tmp_path / figure.RESULTS).points} == set(runs)
    changed = {**settings, "schedule": Schedule(steps=3, batch=4, seed=1), "rates": [1e-2], "only": ["softmax"]}
    with pytest.raises(OptionError, match=r"holds results with other settings \(seed was 0, is 1\); --fresh replaces"):
        recall(**changed)
    assert {(point.label, point.rate) for point in Recall.load(tmp_path / figure.RESULTS).points} == set(runs)
    other = recall(**changed, fresh=True)
    assert len(other.points) == 1
    assert other.points[0].scores != first.points[0].scores or other.points[0].seconds != first.points[0].seconds


@pytest.mark.parametrize("content", ['{"task": {}, "schedule": {}, "points": [{"label": "softmax"}]}', "", "[]"])
def test_results_that_cannot_be_read_are_replaced_on_demand(tmp_path: Path, content: str) -> None:
    (tmp_path / figure.RESULTS).write_text(content)
    asked = dict(drill=TASK, schedule=Schedule(steps=1, batch=2), rates=[1e-2], only=["softmax"], dim=16, out=tmp_path)
    with pytest.raises(OptionError, match=r"recall.json cannot be read .*; --fresh replaces it"):
        recall(**asked)
    assert (tmp_path / figure.RESULTS).read_text() == content
    assert recall(**asked, fresh=True).points[0].parameters > 0


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OptionError, match="out=.*(is a file|cannot be written)"):
            recall(drill=TASK, out=out, progress=lambda *at: pytest.fail("it trains"))
    with pytest.raises(OptionError, match="only=nobody"):
        recall(drill=TASK, only=["nobody"], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_stop_says_how_many_are_done(tmp_path: Path) -> None:
    def watch(step: int, steps: int, note: str) -> None:
        if step > 3:
            raise KeyboardInterrupt

    asked = dict(drill=TASK, schedule=Schedule(steps=3, batch=4), rates=[1e-3, 1e-2], only=["softmax"], dim=16)
    with pytest.raises(KeyboardInterrupt) as stopped:
        recall(**asked, out=tmp_path, progress=watch)
    assert stopped.value.args == (1, 2)
    assert len(Recall.load(tmp_path / figure.RESULTS).points) == 1


def test_each_network_stands_at_the_rate_that_suits_it_on_examples_of_their_own() -> None:
    def run(label: str, rate: float, validation: float, accuracy: float) -> Point:
        return Point(label, "linear", rate, 10, 100, accuracy, validation, 1.0)

    found = Recall({}, {}, [run("a", 1, 0.5, 0.9), run("a", 2, 0.6, 0.4), run("b", 1, 0.3, 0.3), run("b", 2, 0.2, 0.8)])
    assert [(point.label, point.rate, point.accuracy) for point in found.best()] == [("a", 2, 0.4), ("b", 1, 0.3)]


def test_a_run_that_diverges_counts_as_nothing_recalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = figure.fit

    def fit(net: object, drill: MQAR, schedule: Schedule, **rest: object) -> object:
        if schedule.rate > 1:
            raise DivergedError("the loss is nan at step 1")
        return real(net, drill, schedule, **rest)

    monkeypatch.setattr(figure, "fit", fit)
    settings = dict(drill=TASK, schedule=Schedule(steps=2, batch=4), only=["softmax"], dim=16, out=tmp_path)
    far, near = recall(**settings, rates=[2.0, 1e-2]).points
    assert (far.validation, far.accuracy, far.scores) == (0.0, 0.0, {})
    assert near.scores


def test_the_figure_is_of_examples_that_choose_no_rate(tmp_path: Path) -> None:
    one, other = (TASK.heldout(64, seed)[0] for seed in (HELDOUT, figure.TEST_SEED))
    assert not torch.equal(one, other)
    schedule = Schedule(steps=1, batch=2, rate=1e-2)
    found = recall(drill=TASK, schedule=schedule, rates=[1e-2], only=["softmax"], dim=16, out=tmp_path)
    made = spec(NAMED["softmax"], TASK, 16, 2)
    made = evened(made, parameters(made))
    torch.manual_seed(0)
    net = made.build()
    fit(net, TASK, schedule)
    assert found.points[0].accuracy == evaluate(net, TASK, 1024, seed=figure.TEST_SEED)


def test_rates_are_needed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rates must name at least one"):
        recall(drill=TASK, rates=[], out=tmp_path)


def test_unknown_labels(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="only=softmx names no contender; they are softmax, sigmoid"):
        recall(drill=TASK, only=["softmx"], out=tmp_path)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    points = [Point("<b>", "attention", 0.1, 9, 1000, 0.5, 0.5, 1.0), Point("2", "based", 0.1, 9, 500, 0.2, 0.2, 1.0)]
    assert curves.label_places(points) == {"<b>": "top center", "2": "top center"}
    crowd = [Point(label, "linear", 0.1, 9, 100 + place, 0.5, 0.5, 1.0) for place, label in enumerate("abcde")]
    assert [curves.label_places(crowd)[label] for label in "abcd"] == [
        "top center", "bottom center", "middle left", "middle right",
    ]  # fmt: skip
    assert set(curves.label_places(crowd)) == set("abcde")
    page = curves.recall(points, "a <title>", tmp_path / "recall.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<title>a" not in page
    assert "cdn.plot.ly" not in page.partition("plotly.js v")[0]
    assert curves.smooth([1.0] * 50) == pytest.approx([1.0] * 50)
    assert curves.smooth([0.0] * 50 + [1.0] * 50)[-1] > 0.99
