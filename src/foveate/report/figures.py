"""The data of the page's figures, as plain data for `templates/compare.js`.

Plotly interprets a subset of HTML in labels and hover texts, so every name is escaped here.
"""

from __future__ import annotations

import math
from typing import Any

from foveate.bench.comparison.columns import between, column, label, name_of, ordered, times
from foveate.bench.comparison.results import LOSS, Comparison, Row
from foveate.report.headline import headliner
from foveate.report.pareto import frontier, pareto

SHARES = ("cache_kept", "keys_read")
COSTS = ("prefill_ms", "decode_ms", "memory_mb")


def figures(comparison: Comparison) -> dict[str, Any]:
    """Return `quality`, score against each share, `pareto`, score against bytes and times, and `cost`, ratios.

    Empty lists make no figure.
    """
    return {"quality": _quality(comparison), "pareto": pareto(comparison), "cost": _cost(comparison)}


def _quality(comparison: Comparison) -> dict[str, Any]:
    base, loss = comparison.base(), comparison.metric == LOSS
    has_line = math.isfinite(base.score) if base else False
    panels = []
    for measure in SHARES:
        rows = [row for row in ordered(comparison) if _finite(row.score, getattr(row, measure))]
        if rows:
            costs = [(getattr(row, measure), -row.score if loss else row.score) for row in rows]
            # among several budgets of many methods, only the names of the best ones fit
            named = frontier(costs) if len(comparison.budgets) > 1 else set(range(len(rows)))
            points = [{**_point(comparison, row, measure), "named": index in named} for index, row in enumerate(rows)]
            panels.append({"id": measure, "heading": column(comparison, measure).heading, "points": points})
    return {
        "panels": panels,
        "line": _height(comparison, base.score) if base and has_line else None,
        "baseline": label(comparison.baseline),
        "unit": "" if loss else " %",
        "score": column(comparison, "score").heading,
        "better": "lower" if loss else "higher",
    }


def _height(comparison: Comparison, score: float) -> float:
    return score if comparison.metric == LOSS else 100 * score


def _point(comparison: Comparison, row: Row, measure: str) -> dict[str, Any]:
    share, score = column(comparison, measure), column(comparison, "score")
    known = row.score_interval
    texts = [f"{each.heading} {each.show(getattr(row, each.measure))}" for each in (score, share)]
    texts[0] += f" ({between(known, score.show)})" if known else ""
    low, high = known or (row.score, row.score)
    return {
        "name": label(name_of(comparison, row)),
        "x": 100 * getattr(row, measure),
        "y": _height(comparison, row.score),
        "below": _height(comparison, row.score - low),
        "above": _height(comparison, high - row.score),
        "hover": f"<b>{label(name_of(comparison, row))}</b><br>" + "<br>".join(texts),
        "role": _role(comparison, row),
    }


def _cost(comparison: Comparison) -> dict[str, Any]:
    rows = [row for row in ordered(comparison) if row.method != comparison.baseline and row.answers]
    panels = []
    for measure in COSTS:
        ratios = [comparison.ratio(row, measure) for row in rows]
        if any(ratio is not None for ratio in ratios):
            hovers = [_hover(comparison, row, measure) for row in rows]
            heading = column(comparison, measure).heading
            panels.append({"heading": heading, "values": ratios, "texts": [*map(times, ratios)], "hovers": hovers})
    names = [label(name_of(comparison, row)) for row in rows]
    roles = [_role(comparison, row) for row in rows]
    return {"panels": panels, "names": names, "roles": roles, "baseline": label(comparison.baseline)}


def _hover(comparison: Comparison, row: Row, measure: str) -> str:
    shown, ratio = column(comparison, measure), comparison.ratio(row, measure)
    found = comparison.paired(row, measure)
    spread = f" ({between((found.low, found.high), times)})" if found and ratio is not None else ""
    text = f"{shown.heading} {shown.show(getattr(row, measure))}"
    return f"<b>{label(name_of(comparison, row))}</b><br>{text}<br>{times(ratio)}{spread}"


def _role(comparison: Comparison, row: Row) -> str:
    if row.method == comparison.baseline:
        return "baseline"
    return "lead" if row is headliner(comparison) else "other"


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))
