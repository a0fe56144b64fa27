"""Curves and points over a run: plain Plotly pages that open without a network."""

from __future__ import annotations

import html
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
    for family, (color, symbol) in FAMILIES.items():
        own = sorted((point for point in points if point.family == family), key=lambda point: point.state_bytes)
        if own:
            figure.add_trace(
                Scatter(
                    x=[point.state_bytes for point in own], y=[100 * point.accuracy for point in own], name=family,
                    text=[html.escape(point.label) for point in own], textposition="top center",
                    mode="lines+markers+text" if family in ("based", "window") else "markers+text",
                    marker=dict(color=color, symbol=symbol, size=11), line=dict(color=color, width=1, dash="dot"),
                )
            )  # fmt: skip
    figure.update_layout(
        xaxis=dict(title="state while decoding, bytes per sequence", type="log"),
        yaxis=dict(title="recall, % of queries", range=[0, 108]), legend=dict(orientation="h", y=1.08),
    )  # fmt: skip
    return _write(figure, path)


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """A running mean that forgets: each value's weight falls with its age, over about `share` of all steps."""
    keep, mean, out = 1 - 1 / max(1.0, share * len(values)), 0.0, []
    for step, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**step))
    return out


def _write(figure: Any, path: Path) -> Path:
    return write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False}))
