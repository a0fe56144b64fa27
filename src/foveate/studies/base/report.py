"""The report of a study: its findings and plots, as text, as HTML for notebooks, and as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from foveate.core import validate
from foveate.core.errors import ShapeError
from foveate.pages.plot import Line, drawn
from foveate.pages.text import visible


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

    def __post_init__(self) -> None:
        validate.one_of("better", self.better, ("higher", "lower", "equal"))
        validate.at_least("tolerance", self.tolerance, 0)

    @property
    def holds(self) -> bool:
        """Return whether the number lies on the right side of its bound; NaN does not."""
        if self.better == "equal":
            return abs(self.measured - self.bound) <= self.tolerance
        return self.measured >= self.bound if self.better == "higher" else self.measured <= self.bound

    @property
    def needed(self) -> str:
        """Return what the number has to be: "at least 0.35", "0.5 ± 0.1"."""
        if self.better == "equal":
            return f"{self.bound:.4g} ± {self.tolerance:.2g}"
        return f"at {'least' if self.better == 'higher' else 'most'} {self.bound:.4g}"


@dataclass(frozen=True)
class Curve:
    """A line of a plot: `y` over `x`, and `predicted`, the theory's values at the same places, where there are any."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    predicted: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("x", "y", "predicted"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(map(float, values)))
        counts = {len(values) for values in (self.y, self.predicted) if values is not None}
        if counts != {len(self.x)}:
            raise ShapeError(
                f"curve {self.name!r} must have as many values as places: {len(self.x)}; got {sorted(counts)}"
            )


@dataclass(frozen=True)
class Plot:
    """A plot of some curves."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "curves", tuple(self.curves))

    def svg(self) -> str:
        """Draw the plot; its colours are legible on light and on dark pages."""
        lines = [Line(each.name, each.x, each.y, each.predicted) for each in self.curves]
        return drawn(lines, self.title, self.x_label, self.y_label, self.log_x, self.log_y)


@dataclass(frozen=True)
class StudyReport:
    """The findings and plots of one run of a study.

    Args:
        study: the name of the study's class.
        seed: the seed of the run.
        findings: the statements with what was measured, in the study's order.
        plots: curves that were measured on the way.
        options: the study's options in this run.
        seconds: the duration; two reports are equal also if it differs.
    """

    study: str
    seed: int
    findings: Sequence[Finding]
    plots: Sequence[Plot] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", tuple(self.findings))
        object.__setattr__(self, "plots", tuple(self.plots))
        object.__setattr__(self, "options", {name: _tuples(value) for name, value in self.options.items()})

    @property
    def holds(self) -> bool:
        """Return whether all statements hold."""
        return all(finding.holds for finding in self.findings)

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are not finite become null."""
        return json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a report that `to_json` wrote."""
        found = json.loads(text)
        found["findings"] = [Finding(**_numbers(each, "measured", "bound")) for each in found["findings"]]
        found["plots"] = [Plot(**{**each, "curves": _curves(each["curves"])}) for each in found["plots"]]
        return cls(**found)

    def __str__(self) -> str:
        return "\n".join([f"{self.study}, seed {self.seed}", *map(_line, self.findings)])

    def _repr_html_(self) -> str:
        rows = "".join(map(_row, self.findings))
        plots = "".join(f"<h4>{html.escape(visible(plot.title))}</h4>{plot.svg()}" for plot in self.plots)
        heads = "".join(f"<th>{name}</th>" for name in ("statement", "prediction", "measured", "needed", "holds"))
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{plots}"


def _line(finding: Finding) -> str:
    verdict = "holds" if finding.holds else "FAILS"
    return f"{verdict}: {finding.statement} Measured {finding.measured:.4g}, {finding.needed} needed."


def _row(finding: Finding) -> str:
    cells = (finding.statement, finding.prediction, f"{finding.measured:.4g} {finding.unit}", finding.needed)
    texts = (*cells, "yes" if finding.holds else "no")
    return "<tr>" + "".join(f"<td>{html.escape(visible(text.strip()))}</td>" for text in texts) + "</tr>"


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, at any depth."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**fields, **{name: math.nan for name in names if fields[name] is None}}


def _curves(curves: Sequence[dict[str, Any]]) -> list[Curve]:
    read = []
    for curve in curves:
        lists = {name: curve[name] for name in ("x", "y", "predicted") if curve[name] is not None}
        lists = {name: [math.nan if each is None else each for each in values] for name, values in lists.items()}
        read.append(Curve(curve["name"], **lists))
    return read


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
