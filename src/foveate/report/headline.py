"""The result in one sentence, the run in another, and notes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate.bench.comparison.columns import column, listed, name_of, percent
from foveate.bench.comparison.results import LOSS, PAIRS, TIMES, Comparison, Row
from foveate.pages.text import visible

KEEPS = 0.95  # the least share of the baseline's score that counts as kept
WHOLE = 0.995  # shares from here on do not count as savings
_SLACK = 1.1  # the ratio of used share and budget above which a note is shown


def headliner(comparison: Comparison) -> Row | None:
    """Return the row of the headline: the cheapest that keeps the score, else the one that keeps most of it.

    The cheapest has the smallest cache; among methods that store the whole cache, the fewest keys read.
    """
    scored = [(kept, row) for row in comparison.rows if (kept := share_kept(comparison, row)) is not None]
    if not scored:
        return None
    good = [row for kept, row in scored if kept >= KEEPS]
    if not good:
        return max(scored, key=lambda pair: pair[0])[1]
    return min(good, key=lambda row: (*_costs(row), -(share_kept(comparison, row) or 0.0)))


def headline(comparison: Comparison) -> str:
    """Say it in one sentence, such as `At 31 % of the cache, duo_attention keeps 100 % of the full score`."""
    row, base = headliner(comparison), comparison.base()
    name, score = visible(comparison.baseline), column(comparison, "score")
    measured = sum(bool(row.answers) for row in comparison.rows)
    if base is None or not base.answers:
        return f"{_count(measured, 'method')} measured, without {name} to compare with"
    kept = share_kept(comparison, row) if row else None
    if row is None or kept is None:
        verb = "has a loss of" if comparison.metric == LOSS else "scores"
        return f"{name} {verb} {score.show(base.score)}; no other method can be compared with it"
    saving, quality = _saving(row), "likelihood per token" if comparison.metric == LOSS else "score"
    if kept < KEEPS:
        return (
            f"No method keeps {percent(KEEPS)} of the {name} {quality}; "
            f"{name_of(comparison, row)} keeps {percent(kept)}{saving}"
        )
    sentence = f"{visible(row.method)} keeps {percent(kept)} of the {name} {quality}"
    return f"{saving.strip().capitalize()}, {sentence}" if saving else sentence


def about(comparison: Comparison) -> str:
    """Describe the run: model, prompts, task, methods and budget."""
    others = len({row.method for row in comparison.rows} - {comparison.baseline})
    length = f" of length {comparison.length:,}" if comparison.length is not None else ""
    rivals = f"under {_count(others, 'other method')} at {_budgets(comparison)} of each prompt’s cache"
    methods = f"under {visible(comparison.baseline)} and {rivals}" if comparison.base() else rivals
    prompts = f"{_count(comparison.examples, 'prompt')}{length} from the task {visible(comparison.task)}"
    return f"{visible(comparison.model)} answered {prompts}, {methods}."


def _budgets(comparison: Comparison) -> str:
    """Describe the budgets: `a budget of 35 %` or `budgets of 10 %, 25 % and 50 %`."""
    shares = listed([percent(budget) for budget in comparison.budgets])
    return f"budgets of {shares}" if len(comparison.budgets) > 1 else f"a budget of {shares}"


def notes(comparison: Comparison) -> Sequence[str]:
    """Return the notes that a reader needs to interpret the numbers."""
    found = []
    base = comparison.base()
    if base is None or not base.answers:
        found.append(f"{visible(comparison.baseline)} was not measured, so there are no ratios.")
    for row in comparison.rows:
        if row.error:
            verb = "failed on" if row.answers else "did not run:"
            found.append(f"{name_of(comparison, row)} {verb} {visible(row.error)}")
    if any("context holds" in row.error for row in comparison.rows if row.error):
        found.append("Policies that evict can read past the model's context with --renumber.")
    if base is not None and base.answers and len(comparison.rows) > 1 and headliner(comparison) is None:
        found.append(f"{headline(comparison)}.")
    return (*found, *_over_budget(comparison), *_withheld(comparison))


def names_of(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Name rows of one method: `snapkv`, or `snapkv at 10 % and 25 %` if some of several budgets are meant."""
    every = [row for row in comparison.rows if row.method == rows[0].method]
    if len(rows) == len(every):
        return visible(rows[0].method)
    return f"{visible(rows[0].method)} at {listed([percent(row.budget) for row in rows])}"


def _over_budget(comparison: Comparison) -> list[str]:
    """Name the methods that used more than the budget; in short prompts the sinks alone may exceed it."""
    found = []
    for part in comparison.parts():
        (budget,), over = part.budgets, []
        for row in part.rows:
            used = min(row.cache_kept, row.keys_read)
            if row.method != comparison.baseline and _SLACK * budget < used < WHOLE:
                over.append(f"{visible(row.method)} {percent(used)}")
        if over:
            found.append(f"Used more than the budget of {percent(budget)}: {', '.join(over)}.")
    return found


def _withheld(comparison: Comparison) -> list[str]:
    """Name the times without a reliable ratio."""
    few, wide = False, dict[tuple[str, str], list[Row]]()
    for row in comparison.rows:
        if row.method == comparison.baseline or not row.answers:
            continue
        ratios = {measure: comparison.paired(row, measure) for measure in TIMES}
        few = few or any(ratio is None for ratio in ratios.values())
        unsure = [name for name, ratio in ratios.items() if ratio is not None and not ratio.is_certain]
        if unsure:
            named = " and ".join(column(comparison, name).heading for name in unsure)
            wide.setdefault((row.method, named), []).append(row)
    found = []
    if wide:
        names = [f"{names_of(comparison, rows)} ({named})" for (_, named), rows in wide.items()]
        found.append(
            f"The times of single prompts vary too much for a ratio: {'; '.join(names)}. Use an idle machine or more "
            "prompts."
        )
    if few:
        found.append(f"Ratios of times need at least {PAIRS} prompts that {visible(comparison.baseline)} answered too.")
    return found


def share_kept(comparison: Comparison, row: Row) -> float | None:
    """Return the share of the baseline's score; None for the baseline, and if it is undefined.

    For losses it is the ratio of the answers' likelihoods per token.
    """
    base = comparison.base()
    if row.method == comparison.baseline or not row.answers or base is None:
        return None
    if comparison.metric == LOSS:
        kept = math.exp(min(base.score - row.score, 700.0)) if math.isfinite(row.score) else math.nan
        return kept if math.isfinite(kept) else None
    return comparison.ratio(row, "score")


def _costs(row: Row) -> tuple[float, float]:
    """Return the shares of cache and keys as costs; a missing number counts as 1."""
    shares = [share if math.isfinite(share) else 1.0 for share in (row.cache_kept, row.keys_read)]
    return (1.0 if shares[0] >= WHOLE else shares[0], shares[1])


def _saving(row: Row) -> str:
    if row.cache_kept < WHOLE:
        return f" at {percent(row.cache_kept)} of the cache"
    if row.keys_read < WHOLE:
        return f" reading {percent(row.keys_read)} of the keys"
    return ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
