"""The result in one plain sentence, and what was measured in another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate.bench.results import Comparison, Row
from foveate.report.columns import percent, visible

KEEPS = 0.95  # of the baseline's score: what the headline counts as having kept it
WHOLE = 0.995  # a share from here on is no saving worth a headline


def headliner(comparison: Comparison) -> Row | None:
    """The row that the headline is about: cheapest of those that keep the score, else the one that keeps most of it.

    Cheapest means the smallest cache; among methods that all store it whole, the fewest keys read.
    """
    scored = [(kept, row) for row in comparison.rows if (kept := _kept(comparison, row)) is not None]
    if not scored:
        return None
    good = [row for kept, row in scored if kept >= KEEPS]
    if not good:
        return max(scored, key=lambda pair: pair[0])[1]
    return min(good, key=lambda row: (*_costs(row), -row.score))


def headline(comparison: Comparison) -> str:
    """For instance `At 31 % of the cache, duo_attention keeps 100 % of the full score`."""
    row, base = headliner(comparison), comparison.base()
    name = visible(comparison.baseline)
    if base is None:
        return f"{_count(len(comparison.rows), 'method')} measured, without {name} to compare with"
    kept = _kept(comparison, row) if row else None
    if row is None or kept is None:
        return f"{name} scores {percent(base.score)}; no other method can be compared with it"
    where = _where(row)
    if kept < KEEPS:
        return (
            f"No method keeps {percent(KEEPS)} of the {name} score; {visible(row.method)} keeps {percent(kept)}{where}"
        )
    sentence = f"{visible(row.method)} keeps {percent(kept)} of the {name} score"
    return f"{where.strip().capitalize()}, {sentence}" if where else sentence


def about(comparison: Comparison) -> str:
    """What ran: model, task, how many prompts, which methods, under which budget."""
    others = sum(row.method != comparison.baseline for row in comparison.rows)
    length = f" of length {comparison.length:,}" if comparison.length is not None else ""
    rivals = f"under {_count(others, 'other method')} at a cache budget of {percent(comparison.budget)}"
    beside = f"under {visible(comparison.baseline)} and {rivals}" if comparison.base() else rivals
    prompts = f"{_count(comparison.examples, 'prompt')}{length} from the task {visible(comparison.task)}"
    return f"{visible(comparison.model)} answered {prompts}, {beside}."


def notes(comparison: Comparison) -> Sequence[str]:
    """Notes without which the numbers would be misread."""
    if comparison.base() is None:
        return (f"{visible(comparison.baseline)} was not measured, so there are no ratios.",)
    return ()


def _kept(comparison: Comparison, row: Row) -> float | None:
    """The share of the baseline's score; None for the baseline itself and where there is no such share."""
    return None if row.method == comparison.baseline else comparison.ratio(row, "score")


def _costs(row: Row) -> tuple[float, float]:
    """Cache and keys, smaller is cheaper; a missing number counts as no saving."""
    shares = [share if math.isfinite(share) else 1.0 for share in (row.cache_kept, row.keys_read)]
    return (1.0 if shares[0] >= WHOLE else shares[0], shares[1])


def _where(row: Row) -> str:
    if row.cache_kept < WHOLE:
        return f" at {percent(row.cache_kept)} of the cache"
    if row.keys_read < WHOLE:
        return f" reading {percent(row.keys_read)} of the keys"
    return ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
