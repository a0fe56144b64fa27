"""A training in a folder: resumed bit for bit, checked before it starts, never overwritten silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.core.catalog import capabilities, systems
from foveate.core.errors import FoveateError, Interrupted, OptionError
from foveate.train.loop import checkpoint, job as jobs, network
from foveate.train.loop.job import UNFINISHED, Job
from foveate.train.loop.loop import History, Schedule, Training, evaluate, fit, loss_of
from foveate.train.loop.seeds import Trainings, summary


def create(folder: Path, key: str = "hedgehog", task: str = "copy", steps: int = 6, **sizes) -> Job:
    given = sizes or ({"vocabulary": 8, "length": 12} if task == "copy" else {})
    training_task = network.training_task(task, **given)
    return Job(network.spec(key, training_task, dim=16, heads=2), training_task, Schedule(steps=steps, batch=4), folder)


class After:
    """A `stop` function that returns True after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).state_dict()


# titans has states of many kinds; digits draws from stored data
@pytest.mark.parametrize(("key", "task"), [("hedgehog", "copy"), ("titans", "copy"), ("softmax", "digits")])
def test_an_interrupted_training_resumes_bit_for_bit(tmp_path: Path, key: str, task: str) -> None:
    whole, parts = create(tmp_path / "whole", key, task), create(tmp_path / "parts", key, task)
    expected = whole.run()
    for steps in (1, 2):
        with pytest.raises(Interrupted) as stopped:
            parts.run(stop=After(steps))
        torch.manual_seed(99)  # other code may draw random numbers in between
    assert (stopped.value.done, stopped.value.total) == (3, 6)
    assert (tmp_path / "parts" / UNFINISHED).is_file()
    assert parts.check() == "unfinished"
    found = parts.run()
    assert found.history == expected.history
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], value), name
    assert not (tmp_path / "parts" / UNFINISHED).exists()
    assert found.seconds > 0


def test_a_layers_own_random_numbers_are_restored() -> None:
    """Dropout draws from torch's global generator."""
    training_task, schedule = network.training_task("copy", vocabulary=8, length=12), Schedule(steps=6, batch=4)

    def start() -> Training:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(8, 16), nn.Dropout(0.5), nn.Linear(16, 8))
        return Training(net, training_task, schedule)

    whole = start()
    while not whole.done:
        whole.advance()
    first = start()
    for _ in range(3):
        first.advance()
    state = first.state()
    first.advance()  # the saved state must not change with the training
    second = start()
    torch.manual_seed(99)
    second.restore(state, History(whole.history.losses[:3], {}))
    while not second.done:
        second.advance()
    assert second.history.losses == whole.history.losses


def test_a_job_trains_as_fit_does(tmp_path: Path) -> None:
    job = create(tmp_path / "net")
    torch.manual_seed(0)
    net = job.spec.build()
    assert fit(net, job.task, job.schedule) == job.run().history


def test_the_state_is_saved_periodically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SAVE_EVERY", -1.0)
    job, seen = create(tmp_path / "net"), []
    job.run(progress=lambda step, steps, note: seen.append((job.folder / UNFINISHED).exists()))
    assert seen == [True] * 6
    assert not (job.folder / UNFINISHED).exists()
    assert not [path for path in job.folder.iterdir() if path.name.startswith(".")]


def test_a_finished_training_is_read_and_not_repeated(tmp_path: Path) -> None:
    job = create(tmp_path / "net")
    first = job.run()
    when = (job.folder / "model.safetensors").stat().st_mtime_ns
    again = job.run(progress=lambda *at: pytest.fail("it trains"))
    assert again.earlier and not first.earlier
    assert again.history.scores == first.history.scores
    assert again.history.losses == pytest.approx(first.history.losses, abs=1e-5)
    assert (job.folder / "model.safetensors").stat().st_mtime_ns == when
    assert not job.run(fresh=True).earlier


def test_another_training_is_not_overwritten(tmp_path: Path) -> None:
    job = create(tmp_path / "net")
    job.run()
    before = (job.folder / "model.safetensors").read_bytes()
    other = replace(job, schedule=replace(job.schedule, steps=3, rate=0.1))
    with pytest.raises(OptionError, match=r"a training with other options \(schedule.steps was 6, is 3, .*--fresh"):
        other.run()
    with pytest.raises(OptionError, match="network.mixers was"):
        replace(create(job.folder, "softmax")).run()
    assert (job.folder / "model.safetensors").read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        other.run(fresh=True, stop=After(1))
    assert (job.folder / "model.safetensors").read_bytes() == before  # until the new one is done
    assert other.check() == "unfinished"
    with pytest.raises(OptionError, match="an unfinished training with other options"):
        job.run()
    assert len(other.run().history.losses) == 3
    assert other.check() == "finished"


def test_one_kind_of_network_replaces_the_other(tmp_path: Path) -> None:
    create(tmp_path, "softmax", "digits").run()
    create(tmp_path, "softmax", "copy").run(fresh=True)
    assert checkpoint.load(tmp_path)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 8)
    create(tmp_path, "softmax", "digits").run(fresh=True)
    assert checkpoint.load(tmp_path)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_unsuitable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for folder, message in (
        (tmp_path / "file", "is a file; it must be a folder"),
        (tmp_path / "file" / "net", "cannot be written: Not a directory"),
        (tmp_path / "full", r"holds other files \(thesis.tex\)"),
    ):
        for fresh in (False, True):
            with pytest.raises(OptionError, match=message):
                create(folder).run(fresh=fresh, progress=lambda *at: pytest.fail("it trains"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.tex"]


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **rest: object) -> None:
        raise OSError(28, "No space left on device")

    job = create(tmp_path / "net")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "touch", refuse)
        with pytest.raises(OptionError, match="cannot be written: No space left on device"):
            job.run(progress=lambda *at: pytest.fail("it trains"))
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "save_file", refuse)
        with pytest.raises(OptionError, match="cannot be written: No space left on device"):
            job.run(stop=After(2))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x10\x00\x00\x00\x00\x00\x00\x00{}              "])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / UNFINISHED).write_bytes(content)
    with pytest.raises(OptionError, match=r"unfinished.safetensors cannot be read .*--fresh starts again"):
        create(tmp_path).run()
    assert len(create(tmp_path).run(fresh=True).history.losses) == 6


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": 3}'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / checkpoint.RECORD).write_text(content)
    with pytest.raises(OptionError, match="training.json"):
        create(tmp_path).run()


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_several_seeds_train_in_folders_of_their_own(tmp_path: Path) -> None:
    job = create(tmp_path / "net")
    planned = Trainings(job.spec, job.task, job.schedule, job.folder, seeds=(0, 3))
    calls = []
    found = planned.run(progress=lambda *at: calls.append(at))
    assert [at[:2] for at in calls] == [(step, 12) for step in range(1, 13)]
    assert calls[-1][2].startswith("seed 3: loss")
    assert found[0].history.losses != found[3].history.losses
    assert json.loads((job.folder / "seed-3" / checkpoint.RECORD).read_text())["schedule"]["seed"] == 3
    more = replace(planned, seeds=(0, 3, 4)).run()
    assert [one.earlier for one in more.values()] == [True, True, False]
    scores = [one.history.score for one in more.values()]
    together = summary(more)
    assert together["accuracy"] == pytest.approx(sum(scores) / 3)
    assert together["accuracy_deviation"] == pytest.approx(torch.tensor(scores).std().item(), abs=1e-6)
    assert summary({0: found[0]})["accuracy_deviation"] is None
    with pytest.raises(OptionError, match=r"holds other files"):
        job.run()


def test_seeds_need_a_folder_without_a_single_training(tmp_path: Path) -> None:
    job = create(tmp_path / "net")
    job.run()
    planned = Trainings(job.spec, job.task, job.schedule, job.folder, seeds=(0, 1))
    with pytest.raises(OptionError, match="holds a single training"):
        planned.run()
    with pytest.raises(OptionError, match="seeds=1,1 must name each seed once"):
        replace(planned, seeds=(1, 1)).run()


# -- every operator and layer ------------------------------------------------------------------------------------------


def trainable(*, tokens: bool) -> list[str]:
    keys = []
    for row in systems():
        if able := capabilities(row.key):
            keys += [row.key] if not tokens or "causal self" in able["patterns"] else []
    return keys


@pytest.mark.parametrize("key", trainable(tokens=True))
def test_every_causal_system_trains_on_tokens(tmp_path: Path, key: str) -> None:
    job = create(tmp_path / "net", key, steps=2)
    outcome = job.run()
    assert all(loss < 10 for loss in outcome.history.losses)
    loaded = checkpoint.load(job.folder)
    assert evaluate(loaded, job.task) == outcome.history.score
    inputs, labels = job.task.heldout(4)
    assert loss_of(loaded, inputs, labels) < 10


@pytest.mark.parametrize("key", trainable(tokens=False))
def test_every_system_trains_on_images(tmp_path: Path, key: str) -> None:
    outcome = create(tmp_path / "net", key, "digits", steps=2).run()
    assert all(loss < 10 for loss in outcome.history.losses)


@pytest.mark.parametrize("key", sorted(set(trainable(tokens=False)) - set(trainable(tokens=True))))
def test_a_system_without_causal_attention_is_refused_on_tokens(tmp_path: Path, key: str) -> None:
    with pytest.raises(FoveateError, match="defines no causal attention"):
        create(tmp_path / "net", key).check()
    assert not (tmp_path / "net").exists()
