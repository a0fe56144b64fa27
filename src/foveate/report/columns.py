"""The columns of every table: what each is called, how its numbers read, and which end of it is better."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from foveate.bench.results import Comparison, Row

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """One measure of a `Row`; `meaning` explains it to someone who sees the table for the first time."""

    measure: str
    heading: str
    show: Callable[[float], str]
    meaning: str
    higher_is_better: bool = False


@dataclass(frozen=True)
class Cell:
    """One number as text; `ratio` to the baseline is empty for the baseline itself and where there is none."""

    text: str
    ratio: str
    best: bool


def percent(share: float) -> str:
    """0.312 as `31 %`. What falls short of all is never rounded up to 100 %."""
    value = 100 * share
    if not math.isfinite(value):
        return NOTHING
    if 99 < value < 100:
        return f"{math.floor(value * 10) / 10:.1f}\N{NO-BREAK SPACE}%"
    text = f"{value:.0f}" if abs(value) >= 10 or value == 0 else f"{value:.2g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def number(value: float, unit: str) -> str:
    """Three digits that count, more only before the point: `4.13 ms`, `82.0 ms`, `1,204 MB`."""
    if not math.isfinite(value):
        return NOTHING
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{text}\N{NO-BREAK SPACE}{unit}"


def times(ratio: float | None) -> str:
    """0.82 as `0.82×`; empty for None."""
    if ratio is None:
        return ""
    size = abs(ratio)
    text = f"{ratio:,.0f}" if size >= 100 else f"{ratio:.1f}" if size >= 10 else f"{ratio:.2f}"
    return f"{ratio:.1g}×" if 0 < size < 0.005 else f"{text}×"


def milliseconds(value: float) -> str:
    return number(value, "ms")


def megabytes(value: float) -> str:
    return number(value, "MB")


COLUMNS = (
    Column("score", "score", percent, "mean score of the answers", higher_is_better=True),
    Column("cache_kept", "cache kept", percent, "share of the full cache’s slots that were stored"),
    Column("keys_read", "keys read", percent, "share of the visible keys read while decoding"),
    Column("prefill_ms", "prefill", milliseconds, "time to read one prompt"),
    Column("decode_ms", "decode / token", milliseconds, "time for each generated token"),
    Column("peak_mb", "peak memory", megabytes, "most memory in use at any time"),
)


def ordered(comparison: Comparison) -> list[Row]:
    """The rows with the baseline first, the others as they ran."""
    return sorted(comparison.rows, key=lambda row: row.method != comparison.baseline)


def cells(comparison: Comparison) -> list[list[Cell]]:
    """One list of cells for each of the `ordered` rows."""
    rows = ordered(comparison)
    columns = [_column_cells(comparison, rows, column) for column in COLUMNS]
    return [list(line) for line in zip(*columns, strict=True)]


def visible(text: str, lines: bool = False) -> str:
    """`text` with its control characters drawn as symbols, so that no output can steer a terminal or a page.

    With `lines`, line breaks and tabs stay what they are.
    """
    return "".join(char if lines and char in "\n\t" else _symbol(char) for char in text)


def _symbol(char: str) -> str:
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "\N{SYMBOL FOR DELETE}"
    # Cc: the other controls; Cs: lone surrogates, which no encoding can write; bidirectional overrides reorder a line.
    if unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in _OVERRIDES:
        return "\N{REPLACEMENT CHARACTER}"
    return char


_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def _column_cells(comparison: Comparison, rows: list[Row], column: Column) -> list[Cell]:
    texts = [column.show(getattr(row, column.measure)) for row in rows]
    best = _best(rows, column)
    # Where everyone reads alike, nobody stands out.
    mark = {column.show(best)} if best is not None and len(set(texts)) > 1 else set()
    return [
        Cell(
            text,
            "" if row.method == comparison.baseline else times(comparison.ratio(row, column.measure)),
            text in mark,
        )
        for row, text in zip(rows, texts, strict=True)
    ]


def _best(rows: list[Row], column: Column) -> float | None:
    values = [value for row in rows if math.isfinite(value := getattr(row, column.measure))]
    if not values:
        return None
    return max(values) if column.higher_is_better else min(values)
