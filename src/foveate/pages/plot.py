"""Line plots as SVG: measured curves drawn through, predicted ones dashed, legible on light and on dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from foveate.pages.text import visible

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 12, 48
_LEGEND = 19  # the height of a line of the legend
#: Of a brightness that stands out against white and against black.
_COLOURS = ("#2f7fd1", "#c9711b", "#2f9150", "#d1495b", "#8a63c7", "#7d828c")
#: Marks around the origin: a circle, a square, a diamond and a triangle.
_MARKS = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z", "m-3 -3h6v6h-6z", "m0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    "m0 -4l4 7h-8z",
)  # fmt: skip
_MARKED = 40  # a curve of more points has no marks


class Line(NamedTuple):
    """A curve, and the predicted values at the same places, where there are any."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    predicted: Sequence[float] | None = None


class Axis(NamedTuple):
    """An axis from `low` to `high`, which are logarithms if it is logarithmic, at `start` to `stop` of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def place(self, value: float) -> float | None:
        """Return where a value lies; None for one that the axis cannot show."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Return round numbers inside the axis: about five, or powers of ten with their double and fivefold."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            factors = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            found = [factor * 10.0**power for power in powers for factor in factors]
            return [each for each in found if self.low <= math.log10(each) <= self.high]
        step = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def drawn(
    lines: Sequence[Line], title: str, x_label: str, y_label: str, log_x: bool = False, log_y: bool = False,
    dashed: str = "predicted",
) -> str:  # fmt: skip
    """Draw curves with axes and a legend.

    Args:
        lines: the curves; numbers that an axis cannot show are left out.
        title: read out for those who do not see the drawing.
        x_label, y_label: the names of the axes.
        log_x, log_y: logarithmic axes.
        dashed: the name of the predicted values in the legend.
    """
    x = _axis((value for line in lines for value in line.x), _LEFT, _WIDTH - _RIGHT, log_x)
    values = (value for line in lines for values in (line.y, line.predicted or ()) for value in values)
    y = _axis(values, _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = [*_grid(x, y), *_names(x_label, y_label)]
    for number, line in enumerate(lines):
        parts += _curve(line, number, x, y)
    height = _HEIGHT + _LEGEND * (len(lines) + any(line.predicted for line in lines)) + 10
    parts += _legend(lines, dashed)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{_text(title)}" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="currentColor" style="max-width:100%;height:auto">{"".join(parts)}</svg>'
    )


def _axis(values: Iterable[float], start: float, stop: float, log: bool) -> Axis:
    shown = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    shown = [math.log10(value) for value in shown] if log else shown
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.05 * (high - low) or 0.5 * (abs(low) or 1.0)
    return Axis(low - margin, high + margin, start, stop, log)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _grid(x: Axis, y: Axis) -> list[str]:
    bottom, right, parts = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, []
    for value in x.ticks():
        at = x.place(value)
        parts.append(f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="currentColor" stroke-opacity="0.13"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{_number(value)}</text>')
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="currentColor" stroke-opacity="0.13"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at:.1f}" dy="4" text-anchor="end">{_number(value)}</text>')
    return parts


def _names(x_label: str, y_label: str) -> list[str]:
    middle, down = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text x="{middle:g}" y="{_HEIGHT - 9}" text-anchor="middle">{_text(x_label)}</text>',
        f'<text transform="translate(16 {down:g}) rotate(-90)" text-anchor="middle">{_text(y_label)}</text>',
    ]


def _curve(line: Line, number: int, x: Axis, y: Axis) -> list[str]:
    colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
    points = _points(line.x, line.y, x, y)
    parts = [_path(points, colour, "")]
    if line.predicted is not None:
        parts.append(_path(_points(line.x, line.predicted, x, y), colour, ' stroke-dasharray="6 5"'))
    if len(points) <= _MARKED:
        marks = "".join(f"M{across:.1f} {down:.1f}{mark}" for across, down in points)
        parts.append(f'<path d="{marks}" fill="{colour}"/>')
    return parts


def _points(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> list[tuple[float, float]]:
    placed = [(x.place(a), y.place(b)) for a, b in zip(xs, ys, strict=True)]
    return [(across, down) for across, down in placed if across is not None and down is not None]


def _path(points: Sequence[tuple[float, float]], colour: str, more: str) -> str:
    steps = " ".join(f"{across:.1f} {down:.1f}" for across, down in points)
    return f'<path d="M{steps}" fill="none" stroke="{colour}" stroke-width="1.8"{more}/>' if len(points) > 1 else ""


def _legend(lines: Sequence[Line], dashed: str) -> list[str]:
    parts = []
    for number, line in enumerate(lines):
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        at = _HEIGHT + 8 + _LEGEND * number
        parts.append(f'<path d="M{_LEFT} {at}h26" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<path d="M{_LEFT + 13} {at}{mark}" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 34}" y="{at}" dy="4">{_text(line.name)}</text>')
    if any(line.predicted for line in lines):
        at = _HEIGHT + 8 + _LEGEND * len(lines)
        style = 'stroke="currentColor" stroke-width="1.8" stroke-dasharray="6 5"'
        parts.append(f'<path d="M{_LEFT} {at}h26" {style}/>')
        parts.append(f'<text x="{_LEFT + 34}" y="{at}" dy="4">{_text(dashed)}</text>')
    return parts


def _number(value: float) -> str:
    return f"{value:.0e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.6g}"


def _text(text: str) -> str:
    return html.escape(visible(text))
