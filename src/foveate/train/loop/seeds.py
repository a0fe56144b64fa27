"""Trainings that differ in their seed alone: one folder for each, what they have in common, how far they are apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveate.core.errors import OptionError
from foveate.models.base.spec import Spec
from foveate.tasks.base.training_task import Drill
from foveate.train.loop import checkpoint
from foveate.train.loop.job import LOCK, UNFINISHED, Job, Outcome
from foveate.train.loop.loop import Progress, Schedule

SEEDS = "seeds.json"


@dataclass(frozen=True)
class Trainings:
    """The same training with each of `seeds` (in `folder/seed-N`), or with the schedule's where none are named."""

    spec: Spec
    drill: Drill
    schedule: Schedule
    folder: Path
    device: torch.device | str = "cpu"
    seeds: tuple[int, ...] = ()

    @property
    def several(self) -> bool:
        return bool(self.seeds)

    def jobs(self) -> dict[int, Job]:
        if not self.seeds:
            return {self.schedule.seed: Job(self.spec, self.drill, self.schedule, self.folder, self.device)}
        return {
            seed: Job(
                self.spec, self.drill, replace(self.schedule, seed=seed), self.folder / f"seed-{seed}", self.device
            )
            for seed in self.seeds
        }

    def run(
        self, *, fresh: bool = False, stop: Callable[[], bool] = lambda: False, progress: Progress | None = None
    ) -> dict[int, Outcome]:
        """All trainings, one after the other; every one is checked before the first begins.

        Args:
            fresh, stop, progress: as for `Job.run`; steps are counted over all trainings.

        Raises:
            KeyboardInterrupt: with `(step, steps, folder)`, after the training under way was put down.
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

            try:
                found[seed] = job.run(fresh=fresh, stop=stop, progress=watch)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(*interrupt.args, job.folder) from None
        return found

    def _check_folder(self) -> None:
        """Refuse a folder for several seeds in which one training stands, or anything else."""
        if len(set(self.seeds)) < len(self.seeds):
            raise OptionError(f"seeds={','.join(map(str, self.seeds))} names one twice")
        if not self.several or not self.folder.is_dir():
            return
        if any((self.folder / name).exists() for name in (checkpoint.RECORD, UNFINISHED)):
            raise OptionError(f"out={str(self.folder)!r} holds a training of one seed; name a folder of its own")
        for path in sorted(self.folder.iterdir()):
            if path.name not in (SEEDS, "loss.html", LOCK) and not path.name.startswith("seed-"):
                raise OptionError(f"out={str(self.folder)!r} holds other files ({path.name}); name a folder of its own")


@dataclass(frozen=True)
class Spread:
    """A mean and the sample standard deviation around it, which one value alone does not have."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def summary(outcomes: dict[int, Outcome]) -> dict[str, Any]:
    """Accuracy and loss of the trainings, by seed and together, as plain data."""
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
