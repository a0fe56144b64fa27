"""One training in one folder: refused before it begins, kept when it is stopped, never written over in silence."""

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

from foveate.core.errors import OptionError
from foveate.models.base.spec import Spec
from foveate.tasks.base.training_task import Drill
from foveate.train.loop import checkpoint
from foveate.train.loop.loop import History, Progress, Schedule, Training, loss_of

UNFINISHED = "unfinished.safetensors"
#: What a command that holds the folder puts there.
LOCK = ".lock"
#: Seconds between two copies of a training under way, for the case that it is killed.
KEEP_EVERY = 60.0

Stage = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True)
class Outcome:
    """What a training came to. `seconds` are those of the steps, in all sittings; `earlier`: another run did it."""

    history: History
    seconds: float
    parameters: int
    earlier: bool = False


@dataclass(frozen=True)
class Job:
    """A network, its task, a schedule, and the folder for all that comes of them."""

    spec: Spec
    drill: Drill
    schedule: Schedule
    folder: Path
    device: torch.device | str = "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        return checkpoint.settings(self.spec, self.drill, self.schedule)

    def check(self, fresh: bool = False) -> Stage:
        """Refuse what cannot be trained or saved, before anything is; else say what the folder holds of this training.

        Raises:
            OptionError: the folder holds another training (and not `fresh`) or other files, or cannot be written.
            FoveateError: the network does not take the task's batches.
        """
        stage = self._stage(fresh)
        if stage != "finished":
            self._try()
            checkpoint.writable(self.folder)
        return stage

    def run(
        self, *, fresh: bool = False, stop: Callable[[], bool] = lambda: False, progress: Progress | None = None
    ) -> Outcome:
        """Train, or go on with a training that was put down, or read how one went that is done; save what comes of it.

        Args:
            fresh: from the first step, whatever the folder holds. An earlier network stays until the new one is done.
            stop: asked between two steps; True puts the training down.
            progress: called as `progress(step, steps, note)` after every step.

        Raises:
            KeyboardInterrupt: with `(step, steps)`, after the training was put down.
            FoveateError: as `check` does; a loss that is no number any more.
        """
        stage = self.check(fresh)
        torch.manual_seed(self.schedule.seed)
        net = self.spec.build()
        parameters = sum(parameter.numel() for parameter in net.parameters())
        if stage == "finished":
            found = checkpoint.record(self.folder)
            assert found is not None
            return Outcome(checkpoint.history_of(found), float(found.get("seconds", 0.0)), parameters, True)
        training = Training(net.to(self.device), self.drill, self.schedule)
        if stage == "unfinished":
            self._take_up(training)
        self._train(training, stop, progress)
        trained: nn.Module = net.cpu().eval()
        checkpoint.save(
            trained, self.spec, self.drill, self.schedule, training.history, self.folder, seconds=training.seconds
        )
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return Outcome(training.history, training.seconds, parameters)

    def _train(self, training: Training, stop: Callable[[], bool], progress: Progress | None) -> None:
        kept = time.monotonic()
        if progress is not None and training.step:
            progress(training.step, self.schedule.steps, training.note)
        while not training.done:
            if stop():
                if training.step:
                    self._put_down(training)
                raise KeyboardInterrupt(training.step, self.schedule.steps)
            training.advance()
            if time.monotonic() - kept > KEEP_EVERY:
                self._put_down(training)
                kept = time.monotonic()
            if progress is not None:
                progress(training.step, self.schedule.steps, training.note)

    def _try(self) -> None:
        """Two sequences through a network like this one: what its layers refuse, they refuse here."""
        inputs, labels = self.drill.sample(2, torch.Generator().manual_seed(0))
        loss_of(self.spec.build().to(self.device), inputs, labels).backward()

    def _stage(self, fresh: bool) -> Stage:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"out={str(folder)!r} is a file; it must be a folder")
        finished, unfinished = (folder / checkpoint.RECORD).exists(), (folder / UNFINISHED).exists()
        if not (finished or unfinished):
            held = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.exists() else []
            if held:
                raise OptionError(f"out={str(folder)!r} holds other files ({held[0]}); name a folder of its own")
            return "new"
        if fresh:
            return "new"
        if unfinished:  # also beside a finished training, which --fresh had begun to replace
            self._same(_read_settings(folder / UNFINISHED), "an unfinished training")
            return "unfinished"
        found = checkpoint.record(folder) or {}
        self._same(found, "a training")
        return "finished"

    def _same(self, earlier: dict[str, Any], what: str) -> None:
        """Refuse a folder whose training had other settings, and say which."""
        there, here = _flat(earlier), _flat(self.settings)
        other = [name for name in here if there.get(name) != here[name]]
        if other:
            changed = ", ".join(f"{name} was {_short(there.get(name))}, is {_short(here[name])}" for name in other[:3])
            raise OptionError(
                f"out={str(self.folder)!r} holds {what} with other options ({changed}); --fresh replaces it, --out "
                "names another folder"
            )

    def _put_down(self, training: Training) -> None:
        history = training.history
        held = {
            "settings": self.settings, "losses": history.losses, "scores": history.scores, "seconds": training.seconds,
        }  # fmt: skip
        with checkpoint.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{UNFINISHED}.{os.getpid()}"
            try:
                save_file(training.state(), draft, metadata={"training": json.dumps(held)})
                draft.replace(self.folder / UNFINISHED)
            finally:
                draft.unlink(missing_ok=True)

    def _take_up(self, training: Training) -> None:
        path = self.folder / UNFINISHED
        held = _metadata(path)
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        training.restore(state, checkpoint.history_of(held), held["seconds"])


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["training"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} cannot be read ({type(error).__name__}); --fresh begins again") from None


def _read_settings(path: Path) -> dict[str, Any]:
    return dict(_metadata(path)["settings"])


def _short(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `schedule.steps` and so on; what a layer is made of stays in one piece."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("sizes", "schedule", "network"):
            found |= _flat(value, f"{name}.")
        else:
            found[prefix + name] = value
    return found
