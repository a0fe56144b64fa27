"""The table and the page of what was lost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console

from foveate.bench.comparison.results import Comparison, LookedUp
from foveate.report.html import render
from foveate.report.lost import content, losses, sentence, table


def example(index: int, solved: int, dropped: float, **heads: list[float | None]) -> LookedUp:
    named = {name.replace("_", "."): each for name, each in heads.items()}
    return LookedUp(index, solved, 1.0, dropped, ["12: the <b>key</b>"], named)


@pytest.fixture
def lost(comparison: Comparison) -> Comparison:
    given = {
        "sink_recent": [
            example(0, 0, 0.9, L3_1=[0.6, 1.0], L0_2=[0.2, 0.5]),
            example(2, 0, 0.4, L3_1=[0.2, 0.25], L1_1=[0.1, None]),
            example(1, 1, 0.1), example(3, 0, math.nan),
        ],
        "duo_attention": [example(0, 1, 0.0)],
    }  # fmt: skip
    rows = [replace(row, lost=given.get(row.method, [])) for row in comparison.rows]
    return replace(comparison, rows=rows)


def test_broken_examples_are_counted_with_what_was_dropped(lost: Comparison) -> None:
    sink, duo = losses(lost)
    assert (sink.broken, sink.dropped) == (3, 1)
    assert sink.share == pytest.approx(0.65) and sink.share_solved == pytest.approx(0.1)
    # 3.1: (0.6 * 1 + 0.2 * 0.25) / 0.8; an unknown share does not count
    assert sink.heads == [("L3.1", pytest.approx(0.8125)), ("L0.2", pytest.approx(0.5))]
    assert (duo.broken, duo.dropped, duo.heads) == (0, 0, []) and math.isnan(duo.share)
    said = [sentence(each, lost) for each in (sink, duo)]
    assert said[0] == ("sink_recent broke 3 examples; in 1 of them it had dropped what full looked up for the answer.")
    assert said[1] == "duo_attention broke no example that full solves."


def test_the_table_and_the_page(lost: Comparison, comparison: Comparison) -> None:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(lost))
    lines = [line.replace("\xa0", " ") for line in capture.get().splitlines()]
    assert any(line.split()[:5] == ["sink_recent", "3", "1", "of", "3"] and "L3.1 (81 %)" in line for line in lines)
    assert content(comparison) is None and "What was lost" not in render(comparison)
    page = render(lost)
    assert "What was lost" in page and "12: the &lt;b&gt;key&lt;/b&gt;" in page and "sink_recent: 3 broken" in page
    assert "nan" not in page.split("<script")[0].lower().replace("attention", "")
