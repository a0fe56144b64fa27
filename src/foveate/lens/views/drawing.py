"""Drawings of maps as SVG: queries on the left, keys on the right, and a line for each weight."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from foveate.core.errors import OptionError
from foveate.lens.views.edges import Edge
from foveate.pages.text import visible

#: The most lines of a drawing.
MOST = 60_000
_ROW, _LEFT, _RIGHT, _WIDTH = 18, 170, 330, 500
_LONGEST = 24  # characters of a token
_FONT = 'font-family="system-ui, sans-serif" font-size="12"'


def colour(head: int) -> str:
    """Return a head's colour; neighbours differ by much."""
    return f"hsl({head * 137.5 % 360:.0f} 70% 42%)"


def head_drawing(queries: Sequence[str], keys: Sequence[str], lines: Sequence[Edge]) -> str:
    """Draw heads of a layer: tokens on both sides, lines in the heads' colours."""
    height = _ROW * max(len(queries), len(keys)) + 8
    texts = [_token(text, _LEFT - 8, row, "end") for row, text in enumerate(queries)]
    texts += [_token(text, _RIGHT + 8, row, "start") for row, text in enumerate(keys)]
    drawn = _lines(lines, (_LEFT, _RIGHT), _middle)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" {_FONT} fill="currentColor">{"".join(texts)}{drawn}</svg>'
    )


def model_drawing(
    depth: int, width: int, size: tuple[int, int], cells: Iterable[tuple[int, int, Sequence[Edge]]], side: int = 56
) -> str:
    """Draw all heads as a grid of small drawings, a row for each layer.

    Args:
        depth, width: the number of layers and heads.
        size: the number of queries and keys.
        cells: layer, head and lines of each drawing.
        side: the width and height of a drawing.
    """
    gap, left, top = 6, 30, 20
    labels = [
        f'<text x="{left + head * (side + gap) + side / 2:g}" y="14" text-anchor="middle">{head}</text>'
        for head in range(width)
    ]
    labels += [
        f'<text x="{left - 8}" y="{top + layer * (side + gap) + side / 2 + 4:g}" text-anchor="end">{layer}</text>'
        for layer in range(depth)
    ]
    drawn = []
    for layer, head, lines in cells:
        x, y = left + head * (side + gap), top + layer * (side + gap)
        inner = _lines(lines, (3, side - 3), partial(_scaled, side / max(size)))
        drawn.append(
            f'<g transform="translate({x} {y})" data-layer="{layer}" data-head="{head}"><rect width="{side}" '
            f'height="{side}" fill="none" stroke="currentColor" stroke-opacity="0.2"/>{inner}</g>'
        )
    across, down = left + width * (side + gap), top + depth * (side + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" width="{across}" height="{down}" '
        f'role="img" {_FONT} fill="currentColor">{"".join(labels)}{"".join(drawn)}</svg>'
    )


def _lines(lines: Sequence[Edge], ends: tuple[float, float], place: Callable[[int], float]) -> str:
    if len(lines) > MOST:
        raise OptionError(f"{len(lines):,} lines are more than a drawing holds ({MOST:,}); raise threshold=")
    return "".join(
        f'<line x1="{ends[0]:g}" y1="{place(each.query):g}" x2="{ends[1]:g}" y2="{place(each.key):g}" '
        f'stroke="{colour(each.head)}" stroke-opacity="{each.weight:.4f}" stroke-width="1.5"/>'
        for each in lines
    )


def _middle(row: int) -> float:
    return _ROW * (row + 0.5) + 4


def _token(text: str, x: float, row: int, anchor: str) -> str:
    shown = visible(text)
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
    return f'<text x="{x:g}" y="{_middle(row) + 4:g}" text-anchor="{anchor}">{html.escape(shown)}</text>'


def _scaled(step: float, row: int) -> float:
    return (row + 0.5) * step
