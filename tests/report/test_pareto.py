"""What a score costs: which methods no other one beats, their intervals, and tables of several budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from foveate.bench.comparison.columns import cells
from foveate.bench.comparison.results import Comparison
from foveate.report.figures import figures
from foveate.report.headline import about, headline, notes
from foveate.report.html import _content, render
from foveate.report.pareto import frontier, pareto
from foveate.report.table import markdown, render as table


@pytest.fixture
def budgets(comparison: Comparison) -> Comparison:
    """Every method but the baseline at two budgets; the smaller one scores half as much."""
    rows = [row if row.method == "full" else replace(row, budget=0.4) for row in comparison.rows]
    small = [
        replace(row, budget=0.2, score=row.score / 2, cache_kept=row.cache_kept / 2, prompt_mb=row.prompt_mb / 2,
                answer_mb=row.answer_mb / 2)
        for row in rows if row.method != "full"
    ]  # fmt: skip
    return replace(comparison, budgets=[0.2, 0.4], rows=[*small, *rows])


def test_the_frontier_has_what_no_other_point_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.8), (3.0, 0.9), (0.5, 0.1), (1.0, 0.5)]
    assert frontier(points) == {0, 1, 4, 5}, "equal points do not dominate each other"
    assert frontier([]) == set() and frontier([(1.0, 1.0)]) == {0}


def test_points_have_the_score_and_the_cost_with_intervals(comparison: Comparison) -> None:
    memory, decode, prefill = pareto(comparison)
    assert [panel["id"] for panel in (memory, decode, prefill)] == [
        "pareto-memory_mb", "pareto-decode_ms", "pareto-prefill_ms",
    ]  # fmt: skip
    duo = next(point for point in decode["points"] if point["name"] == "duo_attention")
    row = next(row for row in comparison.rows if row.method == "duo_attention")
    ratio = comparison.paired(row, "decode_ms")
    assert ratio is not None
    assert (duo["x"], duo["left"], duo["right"]) == (ratio.value, ratio.value - ratio.low, ratio.high - ratio.value)
    low, high = row.score_interval or (0, 0)
    assert (duo["y"], duo["below"], duo["above"]) == pytest.approx((100, 100 - 100 * low, 100 * high - 100))
    full = next(point for point in decode["points"] if point["name"] == "full")
    assert (full["x"], full["left"], full["right"], full["role"]) == (1.0, 0.0, 0.0, "baseline")
    mb = next(point for point in memory["points"] if point["name"] == "duo_attention")
    assert (mb["x"], mb["left"], mb["right"]) == (row.memory_mb, 0.0, 0.0)


def test_dominated_methods_are_marked(comparison: Comparison) -> None:
    memory, decode, _ = pareto(comparison)
    assert {point["name"] for point in memory["points"] if point["best"]} == {"duo_attention"}
    assert {point["name"] for point in decode["points"] if point["best"]} == {"duo_attention"}
    worse = next(point for point in memory["points"] if point["name"] == "token_select")
    assert worse["hover"].endswith("dominated") and not worse["best"]


def test_a_lower_loss_dominates(comparison: Comparison) -> None:
    losses = {"full": 2.0, "sink_recent": 1.5, "duo_attention": 2.5}
    rows = [replace(row, score=losses[row.method]) for row in comparison.rows if row.method in losses]
    memory = pareto(replace(comparison, rows=rows, metric="loss"))[0]
    # duo_attention takes least memory, sink_recent a little more for a much lower loss
    assert {point["name"] for point in memory["points"] if point["best"]} == {"duo_attention", "sink_recent"}
    assert [point["y"] for point in memory["points"]] == [2.0, 1.5, 2.5]


def test_budgets_of_a_method_are_one_curve(budgets: Comparison) -> None:
    memory = pareto(budgets)[0]
    assert len(memory["points"]) == 9 and len(memory["curves"]) == 4
    for first, second in memory["curves"]:
        names = [memory["points"][index]["name"] for index in (first, second)]
        assert names[0].replace("\xa0", " ").endswith("at 20 %") and names[1].replace("\xa0", " ").endswith("at 40 %")
    named = [point["named"] for panel in figures(budgets)["quality"]["panels"] for point in panel["points"]]
    assert True in named and False in named
    assert all(point["named"] for panel in figures(budgets.at(0.4))["quality"]["panels"] for point in panel["points"])


def test_a_method_without_a_time_has_no_point(comparison: Comparison) -> None:
    few = replace(comparison, rows=[replace(row, answers=row.answers[:2]) for row in comparison.rows])
    assert [panel["id"] for panel in pareto(few)] == ["pareto-memory_mb"]


def test_each_budget_has_a_table(budgets: Comparison) -> None:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table(budgets))
    lines = capture.get().replace("\xa0", " ").splitlines()
    assert [line for line in lines if line.startswith("at ")] == ["at 20 % of the cache", "at 40 % of the cache"]
    assert sum(line.startswith("full ") for line in lines) == 2 and sum(line.startswith("duo") for line in lines) == 2
    text = markdown(budgets).replace("\xa0", " ")
    assert text.index("At 20 % of the cache:\n\n| method") < text.index("At 40 % of the cache:\n\n| method")
    titles = [part["title"].replace("\xa0", " ") for part in _content(budgets)["parts"]]
    assert titles == ["At 20 % of the cache", "At 40 % of the cache"]
    page = render(budgets)
    assert page.count('<table class="results">') == 2 and 'id="budget-2"' in page


def test_the_best_number_is_chosen_within_a_budget(budgets: Comparison) -> None:
    for part in budgets.parts():
        assert sum(line[1].best for line in cells(part)) == 1


def test_sentences_name_the_budgets(budgets: Comparison) -> None:
    def words(text: str) -> str:
        return text.replace("\xa0", " ")

    assert "under 4 other methods at budgets of 20 % and 40 % of each prompt’s cache" in words(about(budgets))
    assert words(headline(budgets)) == "At 31 % of the cache, duo_attention keeps 100 % of the full score"
    wild = [
        replace(row, answers=[replace(a, decode_ms=t) for a, t in zip(row.answers, (1, 3, 5, 7), strict=True)])
        if row.id == ("duo_attention", 0.2) else row
        for row in budgets.rows
    ]  # fmt: skip
    unsure = [words(note) for note in notes(replace(budgets, rows=wild)) if "vary too much" in note]
    assert len(unsure) == 1 and ": duo_attention at 20 % (decode / token)." in unsure[0]
    over = replace(budgets, rows=[replace(row, keys_read=0.3, cache_kept=0.3) for row in budgets.rows])
    noted = [words(note) for note in notes(over) if note.startswith("Used more")]
    over_20 = ", ".join(f"{key} 30 %" for key in ("sink_recent", "duo_attention", "token_select", "act_calibration"))
    assert noted == [f"Used more than the budget of 20 %: {over_20}."]


def test_a_time_whose_interval_holds_1_is_not_marked(comparison: Comparison) -> None:
    def best(found: Comparison) -> list[str]:
        lines = zip(cells(found), ["full", "sink_recent", "duo_attention", "token_select", "act_calibration"],
                    strict=True)  # fmt: skip
        return [name for line, name in lines if line[4].best]

    assert best(comparison) == ["duo_attention"]
    rows = [
        replace(row, answers=[replace(a, decode_ms=t) for a, t in zip(row.answers, (3.9, 4.0, 4.2, 4.3), strict=True)])
        if row.method == "duo_attention" else row
        for row in comparison.rows
    ]  # fmt: skip
    assert best(replace(comparison, rows=rows)) == []
    alone = [row for row in comparison.rows if row.method in ("full", "token_select")]
    lines = cells(replace(comparison, rows=alone))
    assert lines[0][4].best, "the baseline is faster than every other method for sure"
