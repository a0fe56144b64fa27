"""The columns of every table: their headings, number formats, and directions."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.bench.comparison.measured import Measured
from foveate.bench.comparison.rows import TIMES, Row
from foveate.pages.text import visible
from foveate.tasks.base.scores import LOSS

NOTHING = "–"
VARIES = "varies"
LONGEST = 26  # the most characters of a name in a figure; the table shows the whole name


@dataclass(frozen=True)
class Column:
    """One measure of a `Row`; `meaning` explains it to new readers."""

    measure: str
    heading: str
    show: Callable[[float], str]
    meaning: str
    higher_is_better: bool = False


@dataclass(frozen=True)
class Cell:
    """One number as text.

    Args:
        text: the number.
        interval: the confidence interval of a score; else empty.
        ratio: the ratio to the baseline; empty for the baseline and without a ratio, `VARIES` if it is uncertain.
        spread: the confidence interval of a time's ratio; else empty.
        best: True if no number in the column is better, and for times if that is not by chance.
    """

    text: str
    interval: str
    ratio: str
    spread: str
    best: bool

    @property
    def remark(self) -> str:
        """Interval, ratio and spread as one text."""
        return (
            self.interval
            + " " * bool(self.interval and self.ratio)
            + self.ratio
            + f" ({self.spread})" * bool(self.spread)
        )


def percent(share: float) -> str:
    """Format 0.312 as `31 %`; shares below 1 are never rounded up to 100 %."""
    value = 100 * share
    if not math.isfinite(value):
        return NOTHING
    if 99 < value < 100:
        return f"{math.floor(value * 10) / 10:.1f}\N{NO-BREAK SPACE}%"
    text = f"{value:.0f}" if abs(value) >= 10 or value == 0 else f"{value:.2g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def number(value: float, unit: str) -> str:
    """Format with three significant digits, and more only before the point: `4.13 ms`, `82.0 ms`, `1,204 MB`."""
    if not math.isfinite(value):
        return NOTHING
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{text}\N{NO-BREAK SPACE}{unit}"


def times(ratio: float | None) -> str:
    """Format 0.82 as `0.82×`; None is empty."""
    if ratio is None:
        return ""
    size = abs(ratio)
    text = f"{ratio:,.0f}" if size >= 100 else f"{ratio:.1f}" if size >= 10 else f"{ratio:.2f}"
    return f"{ratio:.1g}×" if 0 < size < 0.005 else f"{text}×"


def milliseconds(value: float) -> str:
    return number(value, "ms")


def megabytes(value: float) -> str:
    return number(value, "MB")


def tokens(value: float) -> str:
    return number(value, "tokens")


def plain_number(value: float) -> str:
    """Format a loss: `2.314`."""
    return f"{value:.3f}" if math.isfinite(value) else NOTHING


def columns(comparison: Measured) -> tuple[Column, ...]:
    """Return the columns of the comparison's table; the score is a share of right answers, or the loss."""
    return (_score(comparison), *_shown_if_measured(comparison), *_COSTS)


def column(comparison: Measured, measure: str) -> Column:
    """Return the column of a measure."""
    return next(found for found in columns(comparison) if found.measure == measure)


def _score(comparison: Measured) -> Column:
    if comparison.metric == LOSS:
        return Column("score", "loss", plain_number, "mean next-token loss of the answers, in nats; 95 % interval")
    meaning = f"mean score of the answers by the rule “{visible(comparison.metric)}”; 95 % interval"
    return Column("score", "score", percent, meaning, higher_is_better=True)


def _shown_if_measured(comparison: Measured) -> list[Column]:
    """Return the columns that only some tasks have: the query-agnostic score, and the length of the answers."""
    score = _score(comparison)
    meaning = "the same where the method compressed the context before it knew the question"
    known = (
        Column("agnostic_score", "query-agnostic", score.show, meaning, score.higher_is_better),
        Column("answer_tokens", "answer", tokens, "mean length of the answers up to their end"),
    )
    return [item for item in known if any(math.isfinite(getattr(row, item.measure)) for row in comparison.rows)]


_COSTS = (
    Column("cache_kept", "cache kept", percent, "share of each prompt’s full cache that was stored"),
    Column("keys_read", "keys read", percent, "share of the visible keys read while decoding"),
    Column("prefill_ms", "prefill", milliseconds, "time to read one prompt; ratios prompt by prompt, 95 % interval"),
    Column("decode_ms", "decode / token", milliseconds, "time for each generated token; ratios as for prefill"),
    Column("memory_mb", "memory", megabytes, "tensors live between calls, beyond the weights, at the longest prompt"),
)


def ordered(comparison: Measured) -> list[Row]:
    """Return the rows, the baseline first and the others in the order of the run."""
    return sorted(comparison.rows, key=lambda row: row.method != comparison.baseline)


def name_of(comparison: Measured, row: Row) -> str:
    """Return a row's method, with its budget if the comparison has several."""
    budget = row.id[1]
    several = len(comparison.budgets) > 1 and budget is not None
    return visible(row.method) + (f" at {percent(row.budget)}" if several else "")


def listed(words: Sequence[str]) -> str:
    """Join words: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def label(text: str) -> str:
    """Shorten and escape `text` for Plotly."""
    text = visible(text)
    return html.escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…", quote=False)


def cells(comparison: Measured) -> list[list[Cell]]:
    """Return one list of cells for each of the `ordered` rows."""
    rows = ordered(comparison)
    found = [_column_cells(comparison, rows, column) for column in columns(comparison)]
    return [list(line) for line in zip(*found, strict=True)]


def _column_cells(comparison: Measured, rows: list[Row], column: Column) -> list[Cell]:
    texts = [column.show(getattr(row, column.measure)) for row in rows]
    best = _best(rows, column)
    # If all numbers look alike, none is marked.
    marked = best is not None and len(set(texts) - {NOTHING}) > 1 and _is_sure(comparison, rows, column, best)
    mark = {column.show(best)} if best is not None and marked else set()
    found = []
    for row, text in zip(rows, texts, strict=True):
        known = _interval(row, column.measure) if text != NOTHING else None
        ratio, spread = ("", "") if row.method == comparison.baseline else _ratio(comparison, row, column.measure)
        found.append(Cell(text, between(known, column.show), ratio, spread, text in mark))
    return found


def _interval(row: Row, measure: str) -> tuple[float, float] | None:
    return {"score": row.score_interval, "agnostic_score": row.agnostic_interval}.get(measure)


def _ratio(comparison: Measured, row: Row, measure: str) -> tuple[str, str]:
    if measure in ("score", "agnostic_score") and comparison.metric == LOSS:
        return "", ""  # a ratio of losses has no meaning
    found = comparison.paired(row, measure)
    if found is None:
        return "", ""
    if not found.is_certain:
        return VARIES, ""
    return times(found.value), between((found.low, found.high), times) if measure in TIMES else ""


def between(interval: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    """Format `(0.76, 0.99)` as `76–99 %`, with the unit once; None is empty."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    low, high = map(show, interval)
    head, gap, unit = low.rpartition("\N{NO-BREAK SPACE}")
    if gap and high.endswith(gap + unit):
        low = head
    elif low.endswith("×") and high.endswith("×"):
        low, high = low[:-1], high[:-1]
    return f"{low}–{high}"


def _best(rows: list[Row], column: Column) -> float | None:
    values = [value for row in rows if math.isfinite(value := getattr(row, column.measure))]
    if not values:
        return None
    return max(values) if column.higher_is_better else min(values)


def _is_sure(comparison: Measured, rows: list[Row], column: Column, best: float) -> bool:
    """Return whether a best time differs from the baseline's for sure: the interval of their ratio must not hold 1."""
    if column.measure not in TIMES or comparison.base() not in rows:
        return True
    first = next(row for row in rows if getattr(row, column.measure) == best)
    if first.method == comparison.baseline:
        others = [comparison.paired(row, column.measure) for row in rows if row is not first and row.answers]
        return all(ratio is not None and ratio.low > 1 for ratio in others)
    ratio = comparison.paired(first, column.measure)
    return ratio is not None and ratio.is_certain and ratio.high < 1
