"""Plain sentences on the differences of score that are more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.bench.comparison.columns import listed, percent
from foveate.bench.comparison.results import LOSS, Comparison, Row
from foveate.bench.comparison.significance import Contrast, Findings, findings, goodness
from foveate.bench.parts.paired_tests import fewest
from foveate.pages.text import visible


def statements(comparison: Comparison, found: Findings | None = None) -> list[str]:
    """Say for each budget which methods differ from the full cache, and from the best other method."""
    found = found or findings(comparison)
    if not found.contrasts:
        return []
    lines = [_about(found)]
    examples, count = max(contrast.examples for contrast in found.contrasts), len(found.contrasts)
    if found.test.startswith("McNemar") and examples < fewest(count):
        needed = f"at least {fewest(count)} are needed for {_tests(count)}"
        few = "1 example is" if examples == 1 else f"{examples} examples are"
        return [f"{few} too few for any difference of score to be shown; {needed}."]
    for part in comparison.parts():
        where = f"At {percent(part.budgets[0])}: " if len(comparison.budgets) > 1 else ""
        lines += [where + sentence for sentence in (_with_full(part, found), _with_best(part, found)) if sentence]
    return lines


def _about(found: Findings) -> str:
    return (
        f"Differences of score are tested example by example with {found.test}; {_tests(len(found.contrasts))}, "
        "corrected by Holm’s method; 95 % intervals of single differences."
    )


def _tests(count: int) -> str:
    return f"{count} test{'' if count == 1 else 's'}"


def _with_full(part: Comparison, found: Findings) -> str:
    base = part.base()
    if base is None:
        return ""
    rows = [row for row in part.rows if row is not base]
    return _sentence([each for row in rows if (each := found.of(row, base)) is not None], part)


def _with_best(part: Comparison, found: Findings) -> str:
    rows = [row for row in part.rows if row.method != part.baseline]
    contrasts = [each for row in rows if (each := found.with_best(row, part)) is not None]
    if len(contrasts) < 2:
        return ""
    best = max((contrast.row for contrast in contrasts), key=lambda row: goodness(row, part.metric))
    others = [contrast for contrast in contrasts if contrast.row is not best]
    text = _sentence(others, part, ", the best")
    own = next(contrast for contrast in contrasts if contrast.row is best)
    if own.is_shown:
        return f"{text} {_name(best)} is better than every other method."
    return text


def _sentence(contrasts: Sequence[Contrast], part: Comparison, epithet: str = "") -> str:
    """Say which rows are worse and better than the rows that they are compared with, and which show no difference."""
    if not contrasts:
        return ""
    rival = _name(contrasts[0].other)
    groups = {
        "worse than": [each for each in contrasts if each.is_shown and each.test.difference < 0],
        "better than": [each for each in contrasts if each.is_shown and each.test.difference > 0],
    }
    pieces = [
        f"{listed([f'{_name(each.row)} ({size(each, part)})' for each in some])} {_is(some)} {words} {rival}{epithet}"
        for words, some in groups.items()
        if some
    ]
    same = [_name(each.row) for each in contrasts if not each.is_shown]
    if same:
        pieces.append(f"no difference from {rival}{epithet and f'{epithet},'} is shown for {listed(same)}")
    text = "; ".join(pieces)
    return f"{text[0].upper()}{text[1:]}." if same and len(pieces) == 1 else f"{text}."


def size(contrast: Contrast, comparison: Comparison) -> str:
    """Format a difference with its interval and the corrected p-value: `−38 points, −59 to −15, p = 0.02`."""
    scale, unit, digits = (1, "nats", 3) if comparison.metric == LOSS else (100, "points", 0)
    sign = -1 if comparison.metric == LOSS else 1  # a loss is shown as it is measured
    low, high = sorted(sign * end for end in contrast.test.interval)
    shown = [f"{scale * value:+.{digits}f}".replace("-", "−") for value in (sign * contrast.test.difference, low, high)]
    return f"{shown[0]} {unit}, {shown[1]} to {shown[2]}, {probability(contrast.adjusted)}"


def probability(p: float) -> str:
    """Format a p-value: `p = 0.02`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _is(some: Sequence[Contrast]) -> str:
    return "is" if len(some) == 1 else "are"


def _name(row: Row) -> str:
    return visible(row.method)


def tables(comparison: Comparison, found: Findings) -> list[dict[str, Any]]:
    """Return each budget's contrasts for the page: with the full cache, and with the best other method."""
    made = []
    for part in comparison.parts():
        title = f"At {percent(part.budgets[0])} of the cache" if len(comparison.budgets) > 1 else ""
        rows = []
        for row in part.rows:
            base = part.base()
            full, best = found.of(row, base) if base else None, found.with_best(row, part)
            if row is not base and (full or best):
                rows.append({"name": _name(row), "full": _cell(full, part), "best": _cell(best, part)})
        made.append({"title": title, "rows": rows})
    return [table for table in made if table["rows"]]


def _cell(contrast: Contrast | None, part: Comparison) -> dict[str, Any] | None:
    if contrast is None:
        return None
    return {"rival": _name(contrast.other), "text": size(contrast, part), "shown": contrast.is_shown}
