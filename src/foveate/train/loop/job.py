"""A training in a folder: checked before it starts, saved when interrupted, never overwritten silently."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from foveate.core.errors import Interrupted, OptionError
from foveate.models.base.spec import Spec
from foveate.tasks.base.training_task import TrainingTask
from foveate.train.loop import checkpoint
from foveate.train.loop.loop import History, Progress, Schedule, Training, loss_of

UNFINISHED = "unfinished.safetensors"
#: A command creates this file while it uses the folder.
LOCK = ".lock"
#: Seconds between two saved states of a running training, in case the process is killed.
SAVE_EVERY = 60.0

Stage = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True)
class Outcome:
    """The result of a training.

    Attributes:
        seconds: the time of all steps, over all runs.
        earlier: True if an earlier run had finished it.
    """

    history: History
    seconds: float
    parameters: int
    earlier: bool = False


@dataclass(frozen=True)
class Job:
    """A network, its task, a schedule, and the folder for the results."""

    spec: Spec
    task: TrainingTask
    schedule: Schedule
    folder: Path
    device: torch.device | str = "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        return checkpoint.settings(self.spec, self.task, self.schedule)

    def check(self, fresh: bool = False) -> Stage:
        """Check that the job can be trained and saved; return the stage of the training in the folder.

        Raises:
            OptionError: if the folder holds another training (without `fresh`) or other files, or cannot be written.
            FoveateError: if the network does not accept the task's batches.
        """
        stage = self._stage(fresh)
        if stage != "finished":
            self._dry_run()
            checkpoint.check_writable(self.folder)
        return stage

    def run(
        self, *, fresh: bool = False, stop: Callable[[], bool] = lambda: False, progress: Progress | None = None
    ) -> Outcome:
        """Train and save the network; resume an interrupted training, and only read a finished one.

        Args:
            fresh: start from the first step. An earlier network stays until the new one is finished.
            stop: called between steps; True saves the training and interrupts it.
            progress: called as `progress(step, steps, note)` after every step.

        Raises:
            Interrupted: with the steps that are done, after the interrupted training was saved.
            FoveateError: as `check` raises; DivergedError if the loss is not finite.
        """
        stage = self.check(fresh)
        torch.manual_seed(self.schedule.seed)
        net = self.spec.build()
        parameters = sum(parameter.numel() for parameter in net.parameters())
        if stage == "finished":
            found = checkpoint.record(self.folder)
            assert found is not None
            return Outcome(checkpoint.history_of(found), float(found.get("seconds", 0.0)), parameters, True)
        training = Training(net.to(self.device), self.task, self.schedule)
        if stage == "unfinished":
            self._resume(training)
        self._train(training, stop, progress)
        trained: nn.Module = net.cpu().eval()
        checkpoint.save(
            trained, self.spec, self.task, self.schedule, training.history, self.folder, seconds=training.seconds
        )
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return Outcome(training.history, training.seconds, parameters)

    def _train(self, training: Training, stop: Callable[[], bool], progress: Progress | None) -> None:
        saved = time.monotonic()
        if progress is not None and training.step:
            progress(training.step, self.schedule.steps, training.note)
        while not training.done:
            if stop():
                if training.step:
                    self._save_unfinished(training)
                raise Interrupted(training.step, self.schedule.steps, self.folder)
            training.advance()
            if time.monotonic() - saved > SAVE_EVERY:
                self._save_unfinished(training)
                saved = time.monotonic()
            if progress is not None:
                progress(training.step, self.schedule.steps, training.note)

    def _dry_run(self) -> None:
        """Run two sequences through a network like this one, so that its layers raise their errors now."""
        inputs, labels = self.task.sample(2, torch.Generator().manual_seed(0))
        loss_of(self.spec.build().to(self.device), inputs, labels).backward()

    def _stage(self, fresh: bool) -> Stage:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"out={str(folder)!r} is a file; it must be a folder")
        finished, unfinished = (folder / checkpoint.RECORD).exists(), (folder / UNFINISHED).exists()
        if not (finished or unfinished):
            others = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.exists() else []
            if others:
                raise OptionError(f"out={str(folder)!r} holds other files ({others[0]}); name a folder of its own")
            return "new"
        if fresh:
            return "new"
        if unfinished:  # also beside a finished training that --fresh was replacing
            self._check_same(_read_settings(folder / UNFINISHED), "an unfinished training")
            return "unfinished"
        found = checkpoint.record(folder) or {}
        self._check_same(found, "a training")
        return "finished"

    def _check_same(self, earlier: dict[str, Any], kind: str) -> None:
        """Refuse a folder whose training had other settings, and list them."""
        old, new = _flat(earlier), _flat(self.settings)
        other = [name for name in new if old.get(name) != new[name]]
        if other:
            changed = ", ".join(f"{name} was {_short(old.get(name))}, is {_short(new[name])}" for name in other[:3])
            raise OptionError(
                f"out={str(self.folder)!r} holds {kind} with other options ({changed}); --fresh replaces it, --out "
                "names another folder"
            )

    def _save_unfinished(self, training: Training) -> None:
        history = training.history
        record = {
            "settings": self.settings, "losses": history.losses, "scores": history.scores, "seconds": training.seconds,
        }  # fmt: skip
        with checkpoint.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{UNFINISHED}.{os.getpid()}"
            try:
                save_file(training.state(), draft, metadata={"training": json.dumps(record)})
                draft.replace(self.folder / UNFINISHED)
            finally:
                draft.unlink(missing_ok=True)

    def _resume(self, training: Training) -> None:
        path = self.folder / UNFINISHED
        record = _metadata(path)
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        training.restore(state, checkpoint.history_of(record), record["seconds"])


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["training"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} cannot be read ({type(error).__name__}); --fresh starts again") from None


def _read_settings(path: Path) -> dict[str, Any]:
    return dict(_metadata(path)["settings"])


def _short(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to names such as `schedule.steps`; a layer's own options stay one value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("sizes", "schedule", "network"):
            found |= _flat(value, f"{name}.")
        else:
            found[prefix + name] = value
    return found
