"""The measures of all heads as a small piece of HTML, for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from typing import Any

_TABLE = "border-collapse:collapse;font-size:11px;font-variant-numeric:tabular-nums"
_WIDEST = 16  # heads whose numbers are written out; more are colours only


def layer_head_tables(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of layers and heads for each measure, each coloured from its smallest to its largest value.

    Args:
        rows: as `Lens.table` returns them.
    """
    tables: dict[str, dict[int, dict[int, float]]] = {}
    for row in rows:
        tables.setdefault(row["measure"], {}).setdefault(row["layer"], {})[row["head"]] = row["value"]
    parts = [_table(name, layers) for name, layers in tables.items()]
    return f'<div style="overflow-x:auto">{"".join(parts) or "nothing was measured"}</div>'


def _table(name: str, layers: Mapping[int, Mapping[int, float]]) -> str:
    known = [value for heads in layers.values() for value in heads.values() if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    count = 1 + max(head for heads in layers.values() for head in heads)
    heading = "".join(f"<th>{head}</th>" for head in range(count))
    lines = ""
    for layer, heads in sorted(layers.items()):
        cells = [_cell(layer, head, heads.get(head, math.nan), low, high, count) for head in range(count)]
        lines += f"<tr><th>{layer}</th>{''.join(cells)}</tr>"
    words = f"{html.escape(name)} by layer (rows) and head, {low:.3g} to {high:.3g}"
    caption = f'<caption style="text-align:left;padding:4px 0">{words}</caption>'
    return f'<table style="{_TABLE}">{caption}<tr><th></th>{heading}</tr>{lines}</table>'


def _cell(layer: int, head: int, value: float, low: float, high: float, count: int) -> str:
    if not math.isfinite(value):
        return "<td></td>"
    share = (value - low) / (high - low) if high > low else 0.0
    text = f"{value:.3g}" if count <= _WIDEST else ""
    title = f"layer {layer}, head {head}: {value:.4g}"
    return f'<td title="{title}" style="background:rgba(10,140,150,{0.7 * share:.2f})">{text}</td>'
