"""Curves and points over a run: plain Plotly pages that open without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.results import write_atomic

if TYPE_CHECKING:
    from foveate.bench.recall import Point
    from foveate.train.loop import History

_LAYOUT = dict(
    template="plotly_white", font=dict(family="system-ui, sans-serif", size=14), margin=dict(l=64, r=24, t=64, b=56)
)
#: A hue for each family of operators, told apart also by their marks.
FAMILIES = {
    "attention": ("#1f4e9e", "circle"), "window": ("#2a9d8f", "square"), "based": ("#d1495b", "diamond"),
    "linear": ("#8d6a9f", "triangle-up"), "memory": ("#e08e2b", "star"),
}  # fmt: skip


def loss(history: History, title: str, path: Path) -> Path:
    """The losses of a training run, their running mean, and the accuracy on held-out data, as a page at `path`."""
    from plotly.graph_objects import Figure, Scatter

    steps = list(range(1, len(history.losses) + 1))
    figure = Figure(layout=dict(title=html.escape(title), **_LAYOUT))
    figure.add_trace(Scatter(x=steps, y=history.losses, name="loss", line=dict(color="#c9cdd6", width=1)))
    figure.add_trace(Scatter(x=steps, y=smooth(history.losses), name="loss, smoothed", line=dict(color="#1f4e9e")))
    scores = {"x": list(history.scores), "y": [100 * score for score in history.scores.values()]}
    figure.add_trace(Scatter(**scores, name="accuracy, held out", yaxis="y2", line=dict(color="#d1495b")))
    figure.update_layout(
        xaxis_title="step", yaxis=dict(title="loss", rangemode="tozero"), legend=dict(orientation="h", y=1.08),
        yaxis2=dict(title="accuracy, %", overlaying="y", side="right", range=[0, 101], showgrid=False),
    )  # fmt: skip
    return _write(figure, path)


def recall(points: Sequence[Point], title: str, path: Path) -> Path:
    """Recall against the bytes of the state, one mark for each network, as a page at `path`."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure(layout=dict(title=html.escape(title), **_LAYOUT))
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
        yaxis=dict(title="recall, % of queries", range=[-8, 112]), legend=dict(orientation="h", y=1.08),
    )  # fmt: skip
    return _write(figure, path)


def label_places(points: Sequence[Point]) -> dict[str, str]:
    """On which side of its mark each label stands, such that marks close together do not write over each other."""
    sides, placed = ("top center", "bottom center", "middle left", "middle right"), {}
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
    """A running mean that forgets: each value's weight falls with its age, over about `share` of all steps."""
    keep, mean, out = 1 - 1 / max(1.0, share * len(values)), 0.0, []
    for step, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**step))
    return out


def _write(figure: Any, path: Path) -> Path:
    return write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False}))
