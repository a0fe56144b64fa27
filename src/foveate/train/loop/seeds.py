"""Trainings that differ only in their seed: a folder for each, and mean and deviation over all."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveate.core.errors import OptionError
from foveate.models.base.spec import Spec
from foveate.tasks.base.training_task import TrainingTask
from foveate.train.loop import checkpoint
from foveate.train.loop.job import LOCK, UNFINISHED, Job, Outcome
from foveate.train.loop.loop import Progress, Schedule

SEEDS = "seeds.json"


@dataclass(frozen=True)
class Trainings:
    """The same training with each of `seeds` (in `folder/seed-N`), or with the schedule's seed if there are none."""

    spec: Spec
    task: TrainingTask
    schedule: Schedule
    folder: Path
    device: torch.device | str = "cpu"
    seeds: tuple[int, ...] = ()

    @property
    def several(self) -> bool:
        return bool(self.seeds)

    def jobs(self) -> dict[int, Job]:
        if not self.seeds:
            return {self.schedule.seed: Job(self.spec, self.task, self.schedule, self.folder, self.device)}
        return {
            seed: Job(
                self.spec, self.task, replace(self.schedule, seed=seed), self.folder / f"seed-{seed}", self.device
            )
            for seed in self.seeds
        }

    def run(
        self, *, fresh: bool = False, stop: Callable[[], bool] = lambda: False, progress: Progress | None = None
    ) -> dict[int, Outcome]:
        """Run all trainings in turn; all are checked before the first starts.

        Args:
            fresh, stop, progress: see `Job.run`; `progress` counts the steps of all trainings.

        Raises:
            Interrupted: with the steps that are done and the folder, after the interrupted training was saved.
        """
        jobs = self.jobs()
        self._check_folder()
        for job in jobs.values():
            job.check(fresh)
        found: dict[int, Outcome] = {}
        total = len(jobs) * self.schedule.steps
        for number, (seed, job) in enumerate(jobs.items()):

            def watch(step: int, steps: int, note: str, before: int = number, seed: int = seed) -> None:
                if progress is not None:
                    progress(before * steps + step, total, f"seed {seed}: {note}" if self.several else note)

            found[seed] = job.run(fresh=fresh, stop=stop, progress=watch)
        return found

    def _check_folder(self) -> None:
        """Refuse a folder for several seeds that holds a single training or other files."""
        if len(set(self.seeds)) < len(self.seeds):
            raise OptionError(f"seeds={','.join(map(str, self.seeds))} must name each seed once")
        if not self.several or not self.folder.is_dir():
            return
        if any((self.folder / name).exists() for name in (checkpoint.RECORD, UNFINISHED)):
            raise OptionError(f"out={str(self.folder)!r} holds a single training; seeds need a folder of their own")
        for path in sorted(self.folder.iterdir()):
            if path.name not in (SEEDS, "loss.html", LOCK) and not path.name.startswith("seed-"):
                raise OptionError(f"out={str(self.folder)!r} holds other files ({path.name}); name a folder of its own")


@dataclass(frozen=True)
class Spread:
    """A mean and its sample standard deviation; a single value has none."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def summary(outcomes: dict[int, Outcome]) -> dict[str, Any]:
    """Return accuracy and loss of each seed, with mean and deviation, as plain data."""
    rows = [
        {"seed": seed, "accuracy": found.history.score, "loss": found.history.losses[-1], "seconds": found.seconds}
        for seed, found in outcomes.items()
    ]
    together = {name: Spread.of([row[name] for row in rows]) for name in ("accuracy", "loss")}
    return {
        "seeds": rows,
        **{name: spread.mean for name, spread in together.items()},
        **{f"{name}_deviation": spread.deviation for name, spread in together.items()},
    }
