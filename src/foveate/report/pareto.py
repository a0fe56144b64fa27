"""Score against bytes and against time, as plain data for `templates/compare.js`: which methods no other one beats.

A method is dominated if another one costs no more and scores no less, and is better in one of both. This compares the
measured values; the intervals show how far they can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from foveate.bench.comparison.columns import between, column, label, name_of, ordered, times
from foveate.bench.comparison.results import LOSS, TIMES, Comparison, Row

COSTS = ("memory_mb", "decode_ms", "prefill_ms")


def pareto(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a panel for each cost that at least two rows have.

    Bytes are those of `Row.memory_mb`. Times are ratios to the baseline, prompt by prompt, with their intervals.
    """
    panels = []
    for measure in COSTS:
        found = [(row, cost) for row in ordered(comparison) if (cost := _cost(comparison, row, measure))]
        found = [(row, cost) for row, cost in found if math.isfinite(row.score)]
        if len(found) > 1:
            best = frontier([(cost[0], _goodness(comparison, row)) for row, cost in found])
            points = [_point(comparison, *each, measure, index in best) for index, each in enumerate(found)]
            panels.append({"id": f"pareto-{measure}", "points": points, "curves": _curves(found), **_words(measure)})
    return panels


def frontier(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the indices of the points `(cost, goodness)` that no other point dominates."""
    return {
        index
        for index, (cost, good) in enumerate(points)
        if not any(c <= cost and g >= good and (c < cost or g > good) for c, g in points)
    }


def _goodness(comparison: Comparison, row: Row) -> float:
    return -row.score if comparison.metric == LOSS else row.score


def _cost(comparison: Comparison, row: Row, measure: str) -> tuple[float, float, float] | None:
    """Return a row's cost and the ends of its interval."""
    if measure not in TIMES:
        value = getattr(row, measure)
        return (value, value, value) if math.isfinite(value) else None
    if row.method == comparison.baseline:
        return (1.0, 1.0, 1.0) if row.answers else None
    found = comparison.paired(row, measure)
    return None if found is None else (found.value, found.low, found.high)


def _words(measure: str) -> dict[str, str]:
    if measure in TIMES:
        return {"heading": {"decode_ms": "decode time", "prefill_ms": "prefill time"}[measure], "suffix": "×"}
    return {"heading": "memory", "suffix": " MB"}


def _point(
    comparison: Comparison, row: Row, cost: tuple[float, float, float], measure: str, best: bool
) -> dict[str, Any]:
    scale = 1 if comparison.metric == LOSS else 100
    low, high = row.score_interval or (row.score, row.score)
    return {
        "name": label(name_of(comparison, row)),
        "x": cost[0], "left": cost[0] - cost[1], "right": cost[2] - cost[0],
        "y": scale * row.score, "below": scale * (row.score - low), "above": scale * (high - row.score),
        "hover": _hover(comparison, row, cost, measure, best),
        "best": best, "role": "baseline" if row.method == comparison.baseline else "lead" if best else "other",
    }  # fmt: skip


def _hover(comparison: Comparison, row: Row, cost: tuple[float, float, float], measure: str, best: bool) -> str:
    score, shown = column(comparison, "score"), column(comparison, measure)
    spread = between(row.score_interval, score.show)
    lines = [f"{score.heading} {score.show(row.score)}" + (f" ({spread})" if spread else "")]
    if measure in TIMES:
        lines.append(f"{shown.heading} {times(cost[0])} ({between(cost[1:], times)})")
    else:
        lines.append(f"{shown.heading} {shown.show(cost[0])}")
    lines.append("no other is better at its cost" if best else "dominated")
    return f"<b>{label(name_of(comparison, row))}</b><br>" + "<br>".join(lines)


def _curves(found: Sequence[tuple[Row, Any]]) -> list[list[int]]:
    """Return the points of each method that has several budgets, in the order of the budgets."""
    by_method: dict[str, list[int]] = {}
    for index, (row, _) in enumerate(found):
        by_method.setdefault(row.method, []).append(index)
    return [points for points in by_method.values() if len(points) > 1]
