"""The base class of studies: a paper's statements, each with its prediction and what is measured here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from foveate.core.checked import Checked


@dataclass(frozen=True)
class Finding:
    """A statement of the paper, and what was measured.

    Args:
        statement: the statement in one sentence.
        prediction: what it predicts for this experiment, in words or numbers.
        measured: the number that was measured.
        bound: the number that decides.
        better: on which side of the bound the statement holds, "higher" or "lower", equality included; or "equal",
            within `tolerance`.
        tolerance: see `better`.
        unit: the unit of both numbers, or what they count.
    """

    statement: str
    prediction: str
    measured: float
    bound: float
    better: Literal["higher", "lower", "equal"]
    tolerance: float = 0.0
    unit: str = ""

    @property
    def holds(self) -> bool:
        if self.better == "equal":
            return abs(self.measured - self.bound) <= self.tolerance
        return self.measured >= self.bound if self.better == "higher" else self.measured <= self.bound


@dataclass(frozen=True)
class Curve:
    """A line of a plot: `y` over `x`, and `predicted`, the theory's values at the same places, where there are any."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    predicted: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """A plot of some curves."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class StudyReport:
    """The findings and plots of one run of a study, and the options that it ran with."""

    findings: Sequence[Finding]
    plots: Sequence[Plot] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Return whether all statements hold."""
        return all(finding.holds for finding in self.findings)


class Study(Checked, ABC):
    """An experiment that shows a paper's statements. It runs in under two minutes on two cores, from a seed."""

    @abstractmethod
    def run(self, seed: int = 0) -> StudyReport:
        """Run the experiment. It leaves torch's global generator as it was."""

    @classmethod
    def example(cls) -> Self:
        """Make an instance with sizes so small that it runs in a few seconds; statements may fail at them."""
        return cls()
