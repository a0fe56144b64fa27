"""The base class of studies: experiments that show a paper's statements, from a seed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, Self

import torch

from foveate.core import validate
from foveate.core.catalog import system, systems
from foveate.core.checked import Checked
from foveate.core.errors import OptionError
from foveate.studies.base.report import Finding, Plot, StudyReport

#: Steps done, all steps (None if unknown) and a note, as the command's progress bar takes them.
Progress = Callable[[int, int | None, str], object]


class Study(Checked, ABC):
    """An experiment that shows a paper's statements. It runs in under two minutes on two cores, from a seed.

    A subclass is a dataclass, whose fields are the sizes of the experiment, and defines `measure`.
    """

    @abstractmethod
    def measure(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        """Yield each finding once it is measured, and plots between them.

        Args:
            generator: draws all that is random; the global generators stay as they are.
        """

    def run(self, seed: int = 0, progress: Progress | None = None) -> StudyReport:
        """Run the experiment.

        Args:
            seed: the seed of all that is random.
            progress: called after each finding with the number of findings, None and the statement.
        """
        validate.count("seed", seed, 0)
        validate.between("seed", seed, 0, 2**63 - 1)
        start, findings, plots = time.perf_counter(), list[Finding](), list[Plot]()
        for found in self.measure(torch.Generator().manual_seed(seed)):
            if isinstance(found, Plot):
                plots.append(found)
                continue
            findings.append(found)
            if progress is not None:
                progress(len(findings), None, found.statement)
        seconds = round(time.perf_counter() - start, 1)
        return StudyReport(type(self).__name__, seed, findings, plots, self._options(), seconds)

    @classmethod
    def example(cls) -> Self:
        """Make an instance with sizes so small that it runs in a few seconds; statements may fail at them."""
        return cls()

    def _options(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)} if is_dataclass(self) else {}


def study_of(key: str) -> type[Study]:
    """Return the study of a system of the room `studies`: its object, or the first of its parts that is a `Study`.

    Raises:
        UnknownKey: if the catalogue has no such system.
        OptionError: if the system has no study.
    """
    row = system(key)
    if row.room == "studies":
        for target in (row.object, *row.parts):
            module, _, name = target.partition(":")
            found = getattr(import_module(module), name)
            if isinstance(found, type) and issubclass(found, Study):
                return found
    known = ", ".join(each.key for each in systems("studies"))
    raise OptionError(f'system "{key}" of the room {row.room} has no study; studies: {known}')
