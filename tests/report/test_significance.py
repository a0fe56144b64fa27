"""Plain statements of which differences of score are more than chance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from foveate.bench.comparison.results import Answer, Comparison, Row
from foveate.bench.comparison.significance import findings
from foveate.report.html import render
from foveate.report.significance import probability, size, statements

COUNT = 20


def row(method: str, scores: list[float], budget: float = math.nan) -> Row:
    answers = [Answer(f"p{index}", "e", "o", score) for index, score in enumerate(scores)]
    return Row(method, method, {}, sum(scores) / len(scores), answers=answers, budget=budget)


def right(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (COUNT - count)


@pytest.fixture
def comparison() -> Comparison:
    rows = [row("full", right(19)), row("bad", right(2), 0.2), row("good", right(18), 0.2), row("fair", right(16), 0.2)]
    return make(rows)


def make(rows: list[Row], **more) -> Comparison:
    settings = dict(model="m", task="t", seed=0, device="cpu", dtype="float32", budgets=[0.2], examples=COUNT)
    return Comparison(**{**settings, "length": None, "versions": {}, "rows": rows, **more})


def test_each_method_is_tested_with_the_full_cache_and_with_all_others(comparison):
    found = findings(comparison)
    assert len(found.contrasts) == 3 + 3
    full, bad, good, fair = comparison.rows
    contrast = found.of(bad, full)
    assert contrast.test.difference == pytest.approx(-17 / 20) and contrast.is_shown
    # 17 discordant pairs, all one way, and nothing is surer, so that Holm's factor is 6
    assert contrast.adjusted == pytest.approx(6 * 2 * 0.5**17)
    back = found.of(full, bad)
    assert back.test.difference == -contrast.test.difference
    assert back.test.interval == tuple(-end for end in reversed(contrast.test.interval))
    assert found.with_best(good, comparison).other is fair and found.with_best(bad, comparison).other is good
    assert not found.of(good, full).is_shown and found.of(full, full) is None


def test_statements_say_what_is_shown_and_what_is_not(comparison):
    about, with_full, with_best = statements(comparison)
    assert about == (
        "Differences of score are tested example by example with McNemar's exact test; 6 tests, corrected by Holm’s "
        "method; 95 % intervals of single differences."
    )
    assert with_full.startswith("bad (−85 points, −93 to −58, p < 0.001) is worse than full; ")
    assert with_full.endswith("no difference from full is shown for good and fair.")
    assert with_best.startswith("bad (−80 points, ") and "is worse than good, the best; " in with_best
    assert with_best.endswith("no difference from good, the best, is shown for fair.")


def test_a_difference_that_chance_explains_is_not_claimed(comparison):
    full, bad, *_ = comparison.rows
    close = make([full, replace(row("bad", right(15), 0.2))])
    assert statements(close)[1:] == ["No difference from full is shown for bad."]
    five = [replace(each, answers=each.answers[:5]) for each in (full, bad)]
    assert statements(make(five)) == [
        "5 examples are too few for any difference of score to be shown; at least 6 are needed for 1 test."
    ]
    one = [replace(each, answers=each.answers[:1]) for each in (full, bad)]
    assert statements(make(one))[0].startswith("1 example is too few")


def test_all_budgets_share_one_correction(comparison):
    full, bad, good, fair = comparison.rows
    more = [replace(each, budget=0.5) for each in (bad, good)]
    found = make([full, bad, good, fair, *more], budgets=[0.2, 0.5])
    assert len(findings(found).contrasts) == 6 + 3
    lines = [line.replace("\xa0", " ") for line in statements(found)]
    assert [line[:10] for line in lines[1:]] == ["At 20 %: b", "At 20 %: b", "At 50 %: b", "At 50 %: b"]
    assert findings(found).of(bad, full).adjusted > findings(comparison).of(bad, full).adjusted
    assert findings(found).of(bad, more[0]) is None, "methods at different budgets are not tested"


def test_a_method_that_beats_all_others_is_named():
    rows = [row("full", right(20)), row("best", right(20), 0.2), row("low", right(1), 0.2), row("none", right(0), 0.2)]
    assert statements(make(rows))[-1].endswith("best is better than every other method.")
    better = [row("full", right(2)), row("kept", right(19), 0.2)]
    assert "kept (+85 points, +58 to +93, p < 0.001) is better than full." in statements(make(better))[1]


def test_lower_losses_are_better_and_shown_as_measured():
    base = [2.0 + 0.01 * index for index in range(COUNT)]
    rows = [row("full", base), row("worse", [loss + 0.3 + 0.001 * i for i, loss in enumerate(base)], 0.2)]
    found = make(rows, metric="loss")
    about, line = statements(found)
    assert "a paired permutation test" in about
    assert line.startswith("worse (+0.309 nats, +0.3") and line.endswith("p < 0.001) is worse than full.")
    (contrast,) = findings(found).contrasts
    assert size(contrast, found).startswith("+0.309 nats")


def test_prompts_that_the_full_cache_cannot_read_are_left_out():
    full, other = row("full", right(20)), row("other", right(0), 0.2)
    full.answers[3] = replace(full.answers[3], score=0.0, error="too long")
    (contrast,) = findings(make([full, other])).contrasts
    assert contrast.examples == 19
    other.answers[4] = replace(other.answers[4], score=math.nan)
    assert findings(make([full, other])).contrasts[0].examples == 18
    assert statements(make([full])) == [] and statements(make([full, Row.failed("x", "x", "no")])) == []


def test_the_page_has_the_statements_and_every_difference(comparison):
    page = render(comparison)
    assert "no difference from full is shown for good and fair." in page
    assert page.count('<table class="contrasts">') == 1 and "good: " in page and "<strong>−85 points" in page


@pytest.mark.parametrize(
    "p, text", [(0.0004, "p < 0.001"), (0.0213, "p = 0.021"), (0.5, "p = 0.50"), (1.0, "p = 1.00")]
)
def test_probabilities_are_formatted(p, text):
    assert probability(p) == text
