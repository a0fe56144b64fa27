"""The heads of a model as tables of layers and heads: a page with a picture, and lines for a terminal."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.parts.plaindata import write_atomic
from foveate.pages.text import visible

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.bench.heads import Heads

_SHADES = " ░▒▓█"
_BEST = 8  # heads that are listed by name


def page(found: Heads, path: Path) -> Path:
    """Draw each table as a picture, one cell a head, as a page that works offline."""
    from plotly.graph_objects import Figure, Heatmap
    from plotly.subplots import make_subplots

    titles = [html.escape(f"{name}: {found.meanings[name]}") for name in found.tables]
    figure: Any = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.12)
    for column, (name, table) in enumerate(found.tables.items(), 1):
        rows = table.float().tolist()
        figure.add_trace(
            Heatmap(
                z=rows, x=list(range(table.shape[1])), y=[str(number) for number in found.layers], colorscale="Blues",
                zmin=0.0, zmax=max(1e-9, *(max(row) for row in rows)), showscale=column == len(titles), xgap=1, ygap=1,
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra>" + html.escape(name) + "</extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    title = html.escape(f"Heads of {visible(found.model)} by {found.method}")
    figure.update_layout(
        template="plotly_white", font=dict(family="system-ui, sans-serif", size=13),
        title=dict(text=title, x=0.02, xanchor="left", font=dict(size=16)), margin=dict(l=64, r=24, t=88, b=64),
        height=max(360, 140 + 22 * len(found.layers)),
    )  # fmt: skip
    figure.update_xaxes(title=found.kind, dtick=max(1, max(t.shape[1] for t in found.tables.values()) // 16))
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    assert isinstance(figure, Figure)
    config = {"displaylogo": False, "responsive": True}
    return write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True, config=config))


def lines(found: Heads) -> list[Any]:
    """Return a table for each kind of number: a line for each layer, a shade for each head, and the best heads."""
    from rich.table import Table
    from rich.text import Text

    out: list[Any] = []
    for name, table in found.tables.items():
        top = max(1e-9, float(table.max()))
        shown = Table(box=None, pad_edge=False)
        shown.add_column("layer", justify="right")
        shown.add_column(found.kind, no_wrap=True)
        for heading in ("mean", "best", "head"):
            shown.add_column(heading, justify="right")
        for number, row in zip(found.layers, table, strict=True):
            shades = "".join(_SHADES[round(max(0.0, float(x)) / top * (len(_SHADES) - 1))] for x in row)
            cells = f"{float(row.mean()):.2g}", f"{float(row.max()):.2g}", str(int(row.argmax()))
            shown.add_row(str(number), Text(f"|{shades}|"), *cells)
        out += [f"{name}: {found.meanings[name]}; █ is {top:.2g}", shown, f"highest: {_highest(found, table)}", ""]
    return out


def _highest(found: Heads, table: Tensor) -> str:
    """List the heads with the largest numbers, as layer.head."""
    best = table.flatten().topk(min(_BEST, table.numel()))
    heads = table.shape[1]
    named = [
        f"{found.layers[int(at) // heads]}.{int(at) % heads} {float(value):.2g}"
        for value, at in zip(best.values, best.indices, strict=True)
    ]
    return ", ".join(named)
