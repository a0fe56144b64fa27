"""The tables for the terminal and Markdown, and the sentences and number formats of all reports."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from foveate.bench.comparison.columns import VARIES, between, cells, number, percent, plain_number, times
from foveate.bench.comparison.results import Comparison, Row
from foveate.pages.text import visible
from foveate.report.headline import about, headline, notes
from foveate.report.table import markdown, render


def shown(comparison: Comparison, width: int = 140, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as capture:
        console.print(render(comparison))
    return capture.get().replace("\N{NO-BREAK SPACE}", " ")


def alter(comparison: Comparison, key: str, **changes) -> Comparison:
    rows = [replace(row, **changes) if row.method == key else row for row in comparison.rows]
    return replace(comparison, rows=rows)


@pytest.mark.parametrize(
    "share, text",
    [(1.0, "100 %"), (0.312, "31 %"), (0.9996, "99.9 %"), (0.0312, "3.1 %"), (0.0, "0 %"), (math.nan, "–")],
)
def test_percentages_are_formatted(share, text):
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    "value, text", [(4.126, "4.13 ms"), (82.14, "82.1 ms"), (1204.4, "1,204 ms"), (0.0, "0.00 ms"), (math.inf, "–")]
)
def test_numbers_are_formatted(value, text):
    assert number(value, "ms").replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    "ratio, text", [(0.8213, "0.82×"), (12.34, "12.3×"), (1234.5, "1,234×"), (0.0004, "0.0004×"), (None, "")]
)
def test_ratios_are_formatted(ratio, text):
    assert times(ratio) == text


def test_one_line_per_method_and_the_baseline_first(comparison):
    lines = shown(comparison).rstrip().splitlines()
    assert lines[0].split() == "method score cache kept keys read prefill decode / token memory".split()
    names = [line.split()[0] for line in lines[2:] if not line.startswith(" ")]
    assert names == ["full", "sink_recent", "duo_attention", "token_select", "act_calibration"]


def test_numbers_have_intervals_and_ratios(comparison):
    lines = shown(comparison).splitlines()
    at = {line.split()[0]: index for index, line in enumerate(lines) if line and not line.startswith(" ")}
    numbers, remarks = (" ".join(lines[at["full"] + more].split()) for more in (0, 1))
    assert (numbers, remarks) == ("full 100 % 100 % 100 % 82.1 ms 4.13 ms 98.2 MB", "51–100 %")
    numbers, remarks = (" ".join(lines[at["duo_attention"] + more].split()) for more in (0, 1))
    assert numbers == "duo_attention 100 % 31 % 30 % 84.4 ms 3.05 ms 69.0 MB"
    assert remarks == "51–100 % 1.00× 0.31× 0.30× 1.03× (1.00–1.06) 0.74× (0.72–0.76) 0.70×"


def test_an_uncertain_ratio_is_withheld_with_a_note(comparison):
    answers = comparison.rows[2].answers
    wild = [replace(answer, decode_ms=time) for answer, time in zip(answers, (1, 3, 5, 7), strict=True)]
    unsure = alter(comparison, "duo_attention", answers=wild)
    assert cells(unsure)[2][4].ratio == VARIES and cells(unsure)[2][3].ratio == "1.03×"
    assert "varies" in shown(unsure)
    (note,) = notes(unsure)
    assert "vary too much for a ratio: duo_attention (decode / token)." in note
    few = replace(comparison, rows=[replace(row, answers=row.answers[:2]) for row in comparison.rows])
    assert notes(few) == ("Ratios of times need at least 3 prompts that full answered too.",)
    assert cells(few)[2][4].ratio == ""


def test_a_failed_method_is_a_row_with_its_reason(comparison):
    failed = replace(comparison, rows=[*comparison.rows, Row.failed("gta", "GTA", "head_dim=7 must be even")])
    part = alter(failed, "full", error="1 of 4 prompts: too long")
    lines = shown(part).splitlines()
    assert [line.split() for line in lines if line.startswith("gta")] == [["gta", *["–"] * 6]]
    assert any(line.startswith("failed ") for line in lines) and any(
        line.startswith("failed in part") for line in lines
    )
    assert notes(part) == ("full failed on 1 of 4 prompts: too long", "gta did not run: head_dim=7 must be even")
    assert markdown(part).splitlines()[-1].startswith("| gta (failed: head\\_dim=7 must be even) | – | – |")
    assert words(headline(part)) == words(headline(comparison))
    assert headline(replace(failed, rows=failed.rows[-1:])) == "0 methods measured, without full to compare with"


def test_methods_over_the_budget_are_named(comparison):
    over = alter(comparison, "token_select", keys_read=0.6)
    assert [words(note) for note in notes(over)] == ["Used more than the budget of 40 %: token_select 60 %."]


def test_lower_losses_are_better(comparison):
    losses = {"full": 2.0, "sink_recent": 2.6, "duo_attention": 2.01}
    rows = [replace(row, score=losses[row.method]) for row in comparison.rows if row.method in losses]
    found = replace(comparison, rows=rows, metric="loss")
    assert [line[0].text for line in cells(found)] == ["2.000", "2.600", "2.010"]
    assert [line[0].best for line in cells(found)] == [True, False, False]
    assert not any(line[0].ratio for line in cells(found))
    assert words(headline(found)) == "At 31 % of the cache, duo_attention keeps 99.0 % of the full likelihood per token"
    assert "loss" in shown(found).splitlines()[0]


@pytest.mark.parametrize("interval, show, text", [
    ((0.76, 1.0), percent, "76–100 %"), ((0.72, 0.764), times, "0.72–0.76"), ((80.0, 120.0), times, "80.0–120"),
    (None, percent, ""), ((1.2345, 2.3), plain_number, "1.234–2.300"),
])  # fmt: skip
def test_intervals_have_their_unit_once(interval, show, text):
    assert words(between(interval, show)) == text


def test_a_narrow_terminal_wraps_ratios_and_no_numbers(comparison):
    text = shown(comparison, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("sink_recent", "act_calibration", "84.4 ms", "0.74×", "1,310 MB", "13.3×"):
        assert part in text


def test_ratios_are_dim_and_the_best_is_bold(comparison):
    line = next(line for line in shown(comparison, colour=True).splitlines() if "duo_attention" in line)
    assert "\x1b[1;32m3.05 ms\x1b[0m" in line
    assert "\x1b[2m0.74× (0.72–0.76)" in shown(comparison, colour=True)
    assert "\x1b[1;32m84.4 ms" not in line


def test_equal_numbers_have_no_best(comparison):
    same = replace(comparison, rows=[replace(row, prompt_mb=98.24, answer_mb=98.24) for row in comparison.rows])
    assert not any(line[-1].best for line in cells(same))
    assert sum(line[1].best for line in cells(same)) == 1


def test_missing_numbers_are_dashes_and_never_best(comparison):
    lost = alter(comparison, "duo_attention", decode_ms=math.nan)
    line = next(line for line in shown(lost).splitlines() if "duo_attention" in line)
    assert "–" in line and "nan" not in line
    assert sum(line[4].best for line in cells(lost)) == 1


def test_names_cannot_control_the_terminal(comparison, hostile):
    text = shown(alter(comparison, "sink_recent", method="[red]x[/red]"), colour=True)
    assert "[red]x[/red]" in text
    for control in "\x00\x1b\x9b\u202e\udc80":
        assert control not in shown(hostile)


def test_markdown_is_a_table_with_the_same_cells(comparison):
    lines = markdown(comparison).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert lines[0] == "| method | score | cache kept | keys read | prefill | decode / token | memory |"
    assert lines[1].count("---:") == 6
    assert lines[4].startswith(r"| duo\_attention | **100 %** (51–100 %, 1.00×) | **31 %** (0.31×) |")


def test_markdown_keeps_names_literal(comparison):
    line = markdown(alter(comparison, "sink_recent", method="a|b\n<img src=x>*`[x](y)")).splitlines()[3]
    assert line.startswith(r"| a\|b␊\<img src=x\>\*\`\[x\]\(y\) |")


def test_visible_shows_controls_and_leaves_text():
    assert visible("a\tb\n\x1b") == "a␉b␊␛"
    assert visible("a\tb\n\x1b", lines=True) == "a\tb\n␛"
    assert visible("naïve 日本語 שלום ☃") == "naïve 日本語 שלום ☃"


def words(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_headline_names_the_smallest_cache_that_keeps_the_score(comparison):
    assert words(headline(comparison)) == "At 31 % of the cache, duo_attention keeps 100 % of the full score"


def test_headline_uses_keys_read_if_all_store_the_whole_cache(comparison):
    whole = alter(comparison, "duo_attention", score=0.1)
    assert words(headline(whole)) == "Reading 33 % of the keys, token_select keeps 100 % of the full score"


def test_headline_reports_that_nothing_keeps_the_score(comparison):
    poor = replace(comparison, rows=[row for row in comparison.rows if row.method in ("full", "sink_recent")])
    expected = "No method keeps 95 % of the full score; sink_recent keeps 25 % at 38 % of the cache"
    assert words(headline(poor)) == expected


def test_headline_names_the_best_if_nothing_keeps_the_score(comparison):
    poor = alter(alter(comparison, "duo_attention", score=0.5), "token_select", score=0.6)
    poor = alter(poor, "act_calibration", score=0.55)
    assert words(headline(poor)).startswith("No method keeps 95 % of the full score; token_select keeps 60 %")


def test_headline_counts_95_percent_as_kept(comparison):
    exact = alter(comparison, "sink_recent", score=0.95, cache_kept=0.2)
    assert words(headline(exact)) == "At 20 % of the cache, sink_recent keeps 95 % of the full score"
    short = alter(comparison, "sink_recent", score=0.949, cache_kept=0.2)
    assert words(headline(short)) == "At 31 % of the cache, duo_attention keeps 100 % of the full score"


def test_headline_takes_the_fewest_keys_of_equal_caches_then_the_best_score(comparison):
    keys = alter(comparison, "token_select", cache_kept=0.312, keys_read=0.2)
    assert "token_select keeps 100 %" in words(headline(keys))
    score = alter(alter(comparison, "token_select", cache_kept=0.312, keys_read=0.305), "duo_attention", score=0.97)
    assert "token_select keeps 100 %" in words(headline(score))
    whole = alter(alter(comparison, "duo_attention", cache_kept=0.996, keys_read=0.4), "token_select", cache_kept=1.0)
    assert "token_select keeps 100 %" in words(headline(whole)), "99.6 % of the cache is no saving"


def test_headline_never_prefers_a_cost_that_is_unknown(comparison):
    unknown = alter(comparison, "duo_attention", cache_kept=math.nan, keys_read=math.nan)
    assert words(headline(unknown)) == "Reading 33 % of the keys, token_select keeps 100 % of the full score"


def test_headline_without_a_baseline_or_with_a_score_of_zero(comparison):
    alone = replace(comparison, rows=comparison.rows[2:])
    assert headline(alone) == "3 methods measured, without full to compare with"
    assert notes(alone) == ("full was not measured, so there are no ratios.",)
    zero = alter(comparison, "full", score=0.0)
    assert words(headline(zero)) == "full scores 0 %; no other method can be compared with it"


def test_about_describes_the_run(comparison):
    expected = (
        "labs/lm answered 4 prompts of length 2,048 from the task needle, "
        "under full and under 4 other methods at a budget of 40 % of each prompt’s cache."
    )
    assert words(about(comparison)) == expected


def test_a_comparison_prints_as_the_table(comparison: Comparison, hostile: Comparison) -> None:
    for each in (comparison, hostile):
        lines = [line.rstrip() for line in shown(each, width=120).splitlines()]
        assert str(each).replace("\N{NO-BREAK SPACE}", " ").splitlines() == lines
    assert "duo_attention" in str(comparison) and "prompt=" not in str(comparison)
    several = replace(comparison, budgets=[0.2, 0.4])
    assert "at 20 % of the cache" in str(several).replace("\N{NO-BREAK SPACE}", " ")


def test_a_notebook_shows_the_same_table(comparison: Comparison, hostile: Comparison) -> None:
    for each in (comparison, hostile):
        page = each._repr_html_()
        assert set(re.findall(r"<(/?\w+)", page)) <= {"pre", "/pre", "span", "/span"}
        text = html.unescape(re.sub(r"<[^>]*>", "", page))
        assert [line.rstrip() for line in text.splitlines()] == str(each).splitlines()
    assert re.search(r'<span style="[^"]*font-weight: bold[^"]*">full', comparison._repr_html_())


def test_it_fits_a_terminal(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "84")
    assert 70 < max(map(len, str(comparison).splitlines())) <= 84
