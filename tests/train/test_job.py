"""A training in a folder: taken up bit for bit, refused before it begins, never written over in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.core.catalog import capabilities, systems
from foveate.core.errors import FoveateError, OptionError
from foveate.train.loop import checkpoint, job as jobs, network
from foveate.train.loop.job import UNFINISHED, Job
from foveate.train.loop.loop import History, Schedule, Training, evaluate, fit, loss_of
from foveate.train.loop.seeds import Trainings, summary


def made(folder: Path, key: str = "hedgehog", task: str = "copy", steps: int = 6, **sizes) -> Job:
    given = sizes or ({"vocabulary": 8, "length": 12} if task == "copy" else {})
    drill = network.drill(task, **given)
    return Job(network.spec(key, drill, dim=16, heads=2), drill, Schedule(steps=steps, batch=4), folder)


class After:
    """A wish to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).state_dict()


# tensors of many kinds (titans), batches without a corpus and with one
@pytest.mark.parametrize(("key", "task"), [("hedgehog", "copy"), ("titans", "copy"), ("softmax", "digits")])
def test_put_down_and_taken_up_it_is_the_same_training(tmp_path: Path, key: str, task: str) -> None:
    whole, parts = made(tmp_path / "whole", key, task), made(tmp_path / "parts", key, task)
    expected = whole.run()
    for steps in (1, 2):
        with pytest.raises(KeyboardInterrupt) as stopped:
            parts.run(stop=After(steps))
        torch.manual_seed(99)  # whatever happens in between
    assert stopped.value.args == (3, 6)
    assert (tmp_path / "parts" / UNFINISHED).is_file()
    assert parts.check() == "unfinished"
    found = parts.run()
    assert found.history == expected.history
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], value), name
    assert not (tmp_path / "parts" / UNFINISHED).exists()
    assert found.seconds > 0


def test_what_a_layer_draws_by_itself_is_taken_up_too() -> None:
    """Dropout draws from torch's own generator."""
    drill, schedule = network.drill("copy", vocabulary=8, length=12), Schedule(steps=6, batch=4)

    def begun() -> Training:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(8, 16), nn.Dropout(0.5), nn.Linear(16, 8))
        return Training(net, drill, schedule)

    whole = begun()
    while not whole.done:
        whole.advance()
    first = begun()
    for _ in range(3):
        first.advance()
    state = first.state()
    first.advance()  # what is put down does not go on with the training
    second = begun()
    torch.manual_seed(99)
    second.restore(state, History(whole.history.losses[:3], {}))
    while not second.done:
        second.advance()
    assert second.history.losses == whole.history.losses


def test_it_is_what_fit_gives(tmp_path: Path) -> None:
    job = made(tmp_path / "net")
    torch.manual_seed(0)
    net = job.spec.build()
    assert fit(net, job.drill, job.schedule) == job.run().history


def test_a_copy_is_kept_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "KEEP_EVERY", -1.0)
    job, seen = made(tmp_path / "net"), []
    job.run(progress=lambda step, steps, note: seen.append((job.folder / UNFINISHED).exists()))
    assert seen == [True] * 6
    assert not (job.folder / UNFINISHED).exists()
    assert not [path for path in job.folder.iterdir() if path.name.startswith(".")]


def test_a_finished_training_is_read_and_not_done_again(tmp_path: Path) -> None:
    job = made(tmp_path / "net")
    first = job.run()
    when = (job.folder / "model.safetensors").stat().st_mtime_ns
    again = job.run(progress=lambda *at: pytest.fail("it trains"))
    assert again.earlier and not first.earlier
    assert again.history.scores == first.history.scores
    assert again.history.losses == pytest.approx(first.history.losses, abs=1e-5)
    assert (job.folder / "model.safetensors").stat().st_mtime_ns == when
    assert not job.run(fresh=True).earlier


def test_another_training_is_not_written_over(tmp_path: Path) -> None:
    job = made(tmp_path / "net")
    job.run()
    before = (job.folder / "model.safetensors").read_bytes()
    other = replace(job, schedule=replace(job.schedule, steps=3, rate=0.1))
    with pytest.raises(OptionError, match=r"a training with other options \(schedule.steps was 6, is 3, .*--fresh"):
        other.run()
    with pytest.raises(OptionError, match="network.mixers was"):
        replace(made(job.folder, "softmax")).run()
    assert (job.folder / "model.safetensors").read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        other.run(fresh=True, stop=After(1))
    assert (job.folder / "model.safetensors").read_bytes() == before  # until the new one is done
    assert other.check() == "unfinished"
    with pytest.raises(OptionError, match="an unfinished training with other options"):
        job.run()
    assert len(other.run().history.losses) == 3
    assert other.check() == "finished"


def test_one_kind_of_network_takes_the_place_of_the_other(tmp_path: Path) -> None:
    made(tmp_path, "softmax", "digits").run()
    made(tmp_path, "softmax", "copy").run(fresh=True)
    assert checkpoint.load(tmp_path)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 8)
    made(tmp_path, "softmax", "digits").run(fresh=True)
    assert checkpoint.load(tmp_path)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for folder, says in (
        (tmp_path / "file", "is a file; it must be a folder"),
        (tmp_path / "file" / "net", "cannot be written: Not a directory"),
        (tmp_path / "full", r"holds other files \(thesis.tex\)"),
    ):
        for fresh in (False, True):
            with pytest.raises(OptionError, match=says):
                made(folder).run(fresh=fresh, progress=lambda *at: pytest.fail("it trains"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.tex"]


def test_a_folder_without_permission_or_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **rest: object) -> None:
        raise OSError(28, "No space left on device")

    job = made(tmp_path / "net")
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
def test_a_broken_copy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / UNFINISHED).write_bytes(content)
    with pytest.raises(OptionError, match=r"unfinished.safetensors cannot be read .*--fresh begins again"):
        made(tmp_path).run()
    assert len(made(tmp_path).run(fresh=True).history.losses) == 6


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": 3}'])
def test_a_broken_record(tmp_path: Path, content: str) -> None:
    (tmp_path / checkpoint.RECORD).write_text(content)
    with pytest.raises(OptionError, match="training.json"):
        made(tmp_path).run()


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_several_seeds(tmp_path: Path) -> None:
    job = made(tmp_path / "net")
    planned = Trainings(job.spec, job.drill, job.schedule, job.folder, seeds=(0, 3))
    said = []
    found = planned.run(progress=lambda *at: said.append(at))
    assert [at[:2] for at in said] == [(step, 12) for step in range(1, 13)]
    assert said[-1][2].startswith("seed 3: loss")
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


def test_seeds_beside_one_training(tmp_path: Path) -> None:
    job = made(tmp_path / "net")
    job.run()
    planned = Trainings(job.spec, job.drill, job.schedule, job.folder, seeds=(0, 1))
    with pytest.raises(OptionError, match="holds a training of one seed"):
        planned.run()
    with pytest.raises(OptionError, match="seeds=1,1 names one twice"):
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
    job = made(tmp_path / "net", key, steps=2)
    outcome = job.run()
    assert all(loss < 10 for loss in outcome.history.losses)
    loaded = checkpoint.load(job.folder)
    assert evaluate(loaded, job.drill) == outcome.history.score
    inputs, labels = job.drill.heldout(4)
    assert loss_of(loaded, inputs, labels) < 10


@pytest.mark.parametrize("key", trainable(tokens=False))
def test_every_system_trains_on_images(tmp_path: Path, key: str) -> None:
    outcome = made(tmp_path / "net", key, "digits", steps=2).run()
    assert all(loss < 10 for loss in outcome.history.losses)


@pytest.mark.parametrize("key", sorted(set(trainable(tokens=False)) - set(trainable(tokens=True))))
def test_a_system_without_causal_attention_is_refused_on_tokens(tmp_path: Path, key: str) -> None:
    with pytest.raises(FoveateError, match="defines no causal attention"):
        made(tmp_path / "net", key).check()
    assert not (tmp_path / "net").exists()
