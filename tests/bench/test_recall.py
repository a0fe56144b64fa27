"""The recall figure: networks with equal parameters, states counted in full, and runs that resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.bench import recall_figure as figure
from foveate.bench.recall_figure import (
    NETWORKS,
    Point,
    Recall,
    network_state_bytes,
    parameters,
    recall,
    spec,
    with_parameters,
)
from foveate.core.errors import DivergedError, Interrupted, OptionError
from foveate.report import curves
from foveate.tasks.base.training_task import HELDOUT
from foveate.tasks.training.mqar import MQAR
from foveate.train.loop.loop import Schedule, evaluate, fit

TASK = MQAR(vocabulary=32, length=24, pairs=3)
BY_LABEL = {network.label: network for network in NETWORKS}


def test_there_are_networks_of_every_family() -> None:
    assert len(NETWORKS) >= 10
    assert len(BY_LABEL) == len(NETWORKS)
    assert {network.family for network in NETWORKS} == set(curves.FAMILIES)
    assert sum(network.family == "based" for network in NETWORKS) >= 3


@pytest.mark.parametrize("label", BY_LABEL)
def test_all_networks_have_equal_parameter_counts(label: str) -> None:
    budget = parameters(spec(BY_LABEL["softmax"], TASK, 64, 2))
    network = with_parameters(spec(BY_LABEL[label], TASK, 64, 2), budget)
    assert abs(parameters(network) - budget) < 0.005 * budget


@pytest.mark.parametrize("label", BY_LABEL)
@torch.no_grad()
def test_a_state_is_counted_after_the_whole_sequence(label: str) -> None:
    """Attention's state grows with the sequence, a window's up to the window, and all others' never."""
    network = spec(BY_LABEL[label], TASK, 32, 2)
    sizes = [network_state_bytes(network, replace(TASK, length=length)) for length in (48, 64, 80)]
    assert sizes[0] > 0
    if BY_LABEL[label].family == "attention":
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 16 * 2 * (32 + 32) * 4
    else:
        assert sizes[0] == sizes[1] == sizes[2]


def test_states_have_their_computed_sizes() -> None:
    """There are two layers of two heads of 16 channels, and three tokens of the convolution's 96 inputs, in float32."""
    conv = 2 * 3 * 96
    assert network_state_bytes(spec(BY_LABEL["softmax"], TASK, 32, 2), TASK) == 4 * (conv + 2 * 24 * 64)
    assert network_state_bytes(spec(BY_LABEL["window 8"], TASK, 32, 2), TASK) == 4 * (conv + 2 * 8 * 64)
    assert network_state_bytes(spec(BY_LABEL["lightning"], TASK, 32, 2), TASK) == 4 * (conv + 2 * 2 * 16 * 16)


def test_a_run_resumes(tmp_path: Path) -> None:
    calls, settings = [], dict(task=TASK, schedule=Schedule(steps=3, batch=4), dim=16, out=tmp_path)
    first = recall(**settings, rates=[1e-2], only=["softmax"])
    both = recall(
        **settings, rates=[1e-3, 1e-2], only=["softmax", "lightning"], progress=lambda *at: calls.append(at)
    )  # fmt: skip
    runs = [("softmax", 1e-3), ("softmax", 1e-2), ("lightning", 1e-3), ("lightning", 1e-2)]
    assert [(point.label, point.rate) for point in both.points] == runs
    assert both.points[1] == first.points[0]
    trained = {f"{label} at {rate:g}" for label, rate in runs} - {"softmax at 0.01"}
    assert {text.partition(":")[0] for *_, text in calls} == trained
    assert calls[-1][:2] == (9, 9)
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
    given = dict(task=TASK, schedule=Schedule(steps=1, batch=2), rates=[1e-2], only=["softmax"], dim=16, out=tmp_path)
    with pytest.raises(OptionError, match=r"recall.json cannot be read .*; --fresh replaces it"):
        recall(**given)
    assert (tmp_path / figure.RESULTS).read_text() == content
    assert recall(**given, fresh=True).points[0].parameters > 0


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OptionError, match="out=.*(is a file|cannot be written)"):
            recall(task=TASK, out=out, progress=lambda *at: pytest.fail("it trains"))
    with pytest.raises(OptionError, match="only=nobody"):
        recall(task=TASK, only=["nobody"], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupt_reports_finished_trainings(tmp_path: Path) -> None:
    def watch(step: int, steps: int, note: str) -> None:
        if step > 3:
            raise KeyboardInterrupt

    given = dict(task=TASK, schedule=Schedule(steps=3, batch=4), rates=[1e-3, 1e-2], only=["softmax"], dim=16)
    with pytest.raises(Interrupted) as stopped:
        recall(**given, out=tmp_path, progress=watch)
    assert (stopped.value.done, stopped.value.total) == (1, 2)
    assert len(Recall.load(tmp_path / figure.RESULTS).points) == 1


def test_the_best_learning_rate_is_chosen_by_validation() -> None:
    def run(label: str, rate: float, validation: float, accuracy: float) -> Point:
        return Point(label, "linear", rate, 10, 100, accuracy, validation, 1.0)

    found = Recall({}, {}, [run("a", 1, 0.5, 0.9), run("a", 2, 0.6, 0.4), run("b", 1, 0.3, 0.3), run("b", 2, 0.2, 0.8)])
    assert [(point.label, point.rate, point.accuracy) for point in found.best()] == [("a", 2, 0.4), ("b", 1, 0.3)]


def test_a_diverged_run_has_accuracy_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = figure.fit

    def fit(net: object, task: MQAR, schedule: Schedule, **rest: object) -> object:
        if schedule.rate > 1:
            raise DivergedError("the loss is nan at step 1")
        return real(net, task, schedule, **rest)

    monkeypatch.setattr(figure, "fit", fit)
    settings = dict(task=TASK, schedule=Schedule(steps=2, batch=4), only=["softmax"], dim=16, out=tmp_path)
    far, near = recall(**settings, rates=[2.0, 1e-2]).points
    assert (far.validation, far.accuracy, far.scores) == (0.0, 0.0, {})
    assert near.scores


def test_the_figure_uses_test_examples(tmp_path: Path) -> None:
    one, other = (TASK.heldout(64, seed)[0] for seed in (HELDOUT, figure.TEST_SEED))
    assert not torch.equal(one, other)
    schedule = Schedule(steps=1, batch=2, rate=1e-2)
    found = recall(task=TASK, schedule=schedule, rates=[1e-2], only=["softmax"], dim=16, out=tmp_path)
    network = spec(BY_LABEL["softmax"], TASK, 16, 2)
    network = with_parameters(network, parameters(network))
    torch.manual_seed(0)
    net = network.build()
    fit(net, TASK, schedule)
    assert found.points[0].accuracy == evaluate(net, TASK, 1024, seed=figure.TEST_SEED)


def test_empty_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rates must hold at least one"):
        recall(task=TASK, rates=[], out=tmp_path)


def test_unknown_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="only=softmx must be among softmax, sigmoid"):
        recall(task=TASK, only=["softmx"], out=tmp_path)


def test_the_page_works_offline(tmp_path: Path) -> None:
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
