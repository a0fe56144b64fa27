"""Figures of a training and of recall, as Plotly pages that work offline."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.parts.plaindata import write_atomic

if TYPE_CHECKING:
    from foveate.bench.recall_figure import Point
    from foveate.train.loop.loop import History

#: The legend is below the figure: above it, it would cover the title on narrow pages.
_LAYOUT = dict(
    template="plotly_white",
    font=dict(family="system-ui, sans-serif", size=14),
    margin=dict(l=64, r=24, t=64, b=112),
    legend=dict(orientation="h", x=0, xanchor="left", y=-0.16, yanchor="top"),
)
#: A colour and a marker for each family of operators.
FAMILIES = {
    "attention": ("#1f4e9e", "circle"), "window": ("#2a9d8f", "square"), "based": ("#d1495b", "diamond"),
    "linear": ("#8d6a9f", "triangle-up"), "memory": ("#e08e2b", "star"),
}  # fmt: skip


def loss(histories: Mapping[int, History], title: str, path: Path) -> Path:
    """Draw the losses and the held-out accuracy of one training, or of several seeds, as a page at `path`.

    For one training it shows the loss of each step; for several, each one's running mean, the mean of all, and the mean
    accuracy with its standard deviation as bars.
    """
    from plotly.graph_objects import Figure, Scatter

    runs = list(histories.values())
    figure = Figure(layout=dict(title=_title(title, len(runs)), **_LAYOUT))
    steps = list(range(1, len(runs[0].losses) + 1))
    single, smoothed = len(runs) == 1, [smooth(run.losses) for run in runs]
    for seed, run, running in zip(histories, runs, smoothed, strict=True):
        values, name = (run.losses, "loss") if single else (running, f"loss, seed {seed}")
        figure.add_trace(Scatter(x=steps, y=values, name=name, line=dict(color="#c9cdd6", width=1)))
    mean = [statistics.fmean(at) for at in zip(*smoothed, strict=True)]
    name = "loss, smoothed" if single else "loss, mean"
    figure.add_trace(Scatter(x=steps, y=mean, name=name, line=dict(color="#1f4e9e")))
    figure.add_trace(Scatter(**_accuracy(runs), yaxis="y2", line=dict(color="#d1495b")))
    figure.update_layout(
        xaxis_title="step", yaxis=dict(title="loss", rangemode="tozero"),
        yaxis2=dict(title="accuracy, %", overlaying="y", side="right", range=[0, 101], showgrid=False),
    )  # fmt: skip
    return _write(figure, path)


def _title(title: str, runs: int) -> dict[str, Any]:
    text = title if runs == 1 else f"{title}, {runs} seeds"
    return dict(text=html.escape(text), x=0.02, xanchor="left", font=dict(size=16))


def _accuracy(runs: Sequence[History]) -> dict[str, Any]:
    """Return the mean accuracy at each evaluation, with the standard deviation if there are several trainings."""
    steps = list(runs[0].scores)
    at = [[100 * run.scores[step] for run in runs] for step in steps]
    trace: dict[str, Any] = dict(x=steps, y=[statistics.fmean(values) for values in at], name="accuracy, held out")
    if len(runs) > 1:
        trace |= dict(error_y=dict(array=[statistics.stdev(values) for values in at], thickness=1.5))
        trace |= dict(name="accuracy, held out: mean ± standard deviation")
    return trace


def recall(points: Sequence[Point], title: str, path: Path) -> Path:
    """Draw recall against the bytes of the state, with a marker for each network, as a page at `path`."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure(layout=dict(title=_title(title, 1), **_LAYOUT))
    places = label_places(points)
    for family, (color, symbol) in FAMILIES.items():
        own = sorted((point for point in points if point.family == family), key=lambda point: point.state_bytes)
        if own:
            figure.add_trace(
                Scatter(
                    x=[point.state_bytes for point in own], y=[100 * point.accuracy for point in own], name=family,
                    text=[html.escape(point.label) for point in own],
                    textposition=[places[point.label] for point in own],
                    mode="lines+markers+text" if family in ("based", "window") else "markers+text",
                    marker=dict(color=color, symbol=symbol, size=11), line=dict(color=color, width=1, dash="dot"),
                )
            )  # fmt: skip
    sizes = [point.state_bytes for point in points] or [1]
    ticks = [1024 * 2**power for power in range(-10, 40)]
    bounds = [math.log10(min(sizes) / 2.5), math.log10(max(sizes) * 1.8)]
    axis = dict(title="state while decoding, kB per sequence", type="log", range=bounds, minor=dict(showgrid=False))
    figure.update_layout(
        xaxis=dict(**axis, tickvals=ticks, ticktext=[f"{tick / 1024:g}" for tick in ticks]),
        yaxis=dict(title="recall, % of queries", range=[-8, 112]),
    )  # fmt: skip
    return _write(figure, path)


def label_places(points: Sequence[Point]) -> dict[str, str]:
    """Choose the side of each label so that labels of near markers do not overlap."""
    sides, placed = ("top center", "bottom center", "middle left", "middle right"), dict[str, str]()
    for point in sorted(points, key=lambda point: (-point.accuracy, point.state_bytes)):
        near = {
            placed[other.label]
            for other in points
            if other.label in placed
            and abs(math.log(other.state_bytes / point.state_bytes)) < 0.7
            and abs(other.accuracy - point.accuracy) < 0.08
        }
        placed[point.label] = next((side for side in sides if side not in near), sides[0])
    return placed


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Return an exponential running mean over about `share` of all steps."""
    keep, mean, out = 1 - 1 / max(1.0, share * len(values)), 0.0, []
    for step, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**step))
    return out


def _write(figure: Any, path: Path) -> Path:
    config = {"displaylogo": False, "responsive": True}
    return write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True, config=config))
