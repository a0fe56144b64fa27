"""What the page's figures draw, as plain data for `templates/compare.js`.

Plotly reads a subset of HTML in labels and hover texts: every name is escaped here, whatever the page does with it.
"""

from __future__ import annotations

import html
import math
from typing import Any

from foveate.bench.results import Comparison, Row
from foveate.report.columns import COLUMNS, ordered, times, visible
from foveate.report.headline import headliner

SHARES = ("cache_kept", "keys_read")
COSTS = ("prefill_ms", "decode_ms", "peak_mb")
LONGEST = 26  # characters of a name beside a mark; the table has it whole


def figures(comparison: Comparison) -> dict[str, Any]:
    """`quality`: score against each share; `cost`: time and memory relative to the baseline. Empty lists: no figure."""
    return {"quality": _quality(comparison), "cost": _cost(comparison)}


def label(text: str) -> str:
    """`text` as Plotly may be given it."""
    text = visible(text)
    return html.escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…", quote=False)


def _quality(comparison: Comparison) -> dict[str, Any]:
    base = comparison.base()
    drawn = math.isfinite(base.score) if base else False
    panels = []
    for measure in SHARES:
        rows = [row for row in ordered(comparison) if _finite(row.score, getattr(row, measure))]
        if rows:
            points = [_point(comparison, row, measure) for row in rows]
            panels.append({"id": measure, "heading": _column(measure).heading, "points": points})
    return {
        "panels": panels,
        "line": 100 * base.score if base and drawn else None,
        "baseline": label(comparison.baseline),
    }


def _point(comparison: Comparison, row: Row, measure: str) -> dict[str, Any]:
    share, score = _column(measure), _column("score")
    texts = [f"{column.heading} {column.show(getattr(row, column.measure))}" for column in (score, share)]
    return {
        "name": label(row.method),
        "x": 100 * getattr(row, measure),
        "y": 100 * row.score,
        "hover": f"<b>{label(row.method)}</b><br>" + "<br>".join(texts),
        "role": _role(comparison, row),
    }


def _cost(comparison: Comparison) -> dict[str, Any]:
    rows = [row for row in ordered(comparison) if row.method != comparison.baseline]
    panels = []
    for measure in COSTS:
        ratios = [comparison.ratio(row, measure) for row in rows]
        if any(ratio is not None for ratio in ratios):
            hovers = [_hover(row, measure, ratio) for row, ratio in zip(rows, ratios, strict=True)]
            heading = _column(measure).heading
            panels.append({"heading": heading, "values": ratios, "texts": [*map(times, ratios)], "hovers": hovers})
    names = [label(row.method) for row in rows]
    roles = [_role(comparison, row) for row in rows]
    return {"panels": panels, "names": names, "roles": roles, "baseline": label(comparison.baseline)}


def _hover(row: Row, measure: str, ratio: float | None) -> str:
    column = _column(measure)
    return f"<b>{label(row.method)}</b><br>{column.heading} {column.show(getattr(row, measure))}<br>{times(ratio)}"


def _role(comparison: Comparison, row: Row) -> str:
    if row.method == comparison.baseline:
        return "baseline"
    return "lead" if row is headliner(comparison) else "other"


def _column(measure: str) -> Any:
    return next(column for column in COLUMNS if column.measure == measure)


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))
