"""The table in the terminal and in Markdown, and the words and numbers that all reports share."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console

from foveate.bench.results import Comparison
from foveate.report.columns import cells, number, percent, times, visible
from foveate.report.headline import about, headline, notes
from foveate.report.table import markdown, render


def shown(comparison: Comparison, width: int = 140, colour: bool = False) -> str:
    console = Console(width=width, force_terminal=colour, color_system="standard" if colour else None)
    with console.capture() as capture:
        console.print(render(comparison))
    return capture.get().replace("\N{NO-BREAK SPACE}", " ")


def alter(comparison: Comparison, who: str, **changes) -> Comparison:
    rows = [replace(row, **changes) if row.method == who else row for row in comparison.rows]
    return replace(comparison, rows=rows)


@pytest.mark.parametrize(
    "share, text",
    [(1.0, "100 %"), (0.312, "31 %"), (0.9996, "99.9 %"), (0.0312, "3.1 %"), (0.0, "0 %"), (math.nan, "–")],
)
def test_percent(share, text):
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    "value, text", [(4.126, "4.13 ms"), (82.14, "82.1 ms"), (1204.4, "1,204 ms"), (0.0, "0.00 ms"), (math.inf, "–")]
)
def test_number(value, text):
    assert number(value, "ms").replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    "ratio, text", [(0.8213, "0.82×"), (12.34, "12.3×"), (1234.5, "1,234×"), (0.0004, "0.0004×"), (None, "")]
)
def test_times(ratio, text):
    assert times(ratio) == text


def test_one_line_per_method_and_the_baseline_first(comparison):
    lines = shown(comparison).rstrip().splitlines()
    assert lines[0].split() == "method score cache kept keys read prefill decode / token peak memory".split()
    names = [line.split()[0] for line in lines[2:]]
    assert names == ["full", "sink_recent", "duo_attention", "token_select", "act_calibration"]


def test_every_number_has_its_ratio_to_the_baseline(comparison):
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown(comparison).splitlines()[2:]}
    assert lines["full"] == "100 % 100 % 100 % 82.1 ms 4.13 ms 98.2 MB"
    ratios = "100 % (1.00×) 31 % (0.31×) 30 % (0.30×) 84.4 ms (1.03×) 3.05 ms (0.74×) 69.0 MB (0.70×)"
    assert lines["duo_attention"] == ratios


def test_a_narrow_terminal_moves_ratios_down_but_breaks_no_number(comparison):
    text = shown(comparison, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("sink_recent", "act_calibration", "84.4 ms", "(0.74×)", "1,310 MB", "(13.3×)"):
        assert part in text


def test_ratios_are_dim_and_the_best_stands_out(comparison):
    line = next(line for line in shown(comparison, colour=True).splitlines() if "duo_attention" in line)
    assert "\x1b[1;32m3.05 ms\x1b[0m" in line
    assert "2;39m (0.74×)" in line
    assert "\x1b[1;32m84.4 ms" not in line


def test_nobody_is_best_where_all_are_alike(comparison):
    same = replace(comparison, rows=[replace(row, peak_mb=98.24) for row in comparison.rows])
    assert not any(line[-1].best for line in cells(same))
    assert sum(line[1].best for line in cells(same)) == 1


def test_missing_numbers_are_dashes_and_never_best(comparison):
    lost = alter(comparison, "duo_attention", decode_ms=math.nan)
    line = next(line for line in shown(lost).splitlines() if "duo_attention" in line)
    assert "–" in line and "nan" not in line
    assert sum(line[4].best for line in cells(lost)) == 1


def test_names_cannot_steer_the_terminal(comparison, hostile):
    text = shown(alter(comparison, "sink_recent", method="[red]x[/red]"), colour=True)
    assert "[red]x[/red]" in text
    for control in "\x00\x1b\x9b\u202e\udc80":
        assert control not in shown(hostile)


def test_markdown_is_a_table_with_the_same_cells(comparison):
    lines = markdown(comparison).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert lines[0] == "| method | score | cache kept | keys read | prefill | decode / token | peak memory |"
    assert lines[1].count("---:") == 6
    assert lines[4].startswith(r"| duo\_attention | **100 %** (1.00×) | **31 %** (0.31×) |")


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


def test_headline_turns_to_keys_read_where_all_store_the_whole_cache(comparison):
    whole = alter(comparison, "duo_attention", score=0.1)
    assert words(headline(whole)) == "Reading 33 % of the keys, token_select keeps 100 % of the full score"


def test_headline_says_so_when_nothing_keeps_the_score(comparison):
    poor = replace(comparison, rows=[row for row in comparison.rows if row.method in ("full", "sink_recent")])
    expected = "No method keeps 95 % of the full score; sink_recent keeps 25 % at 38 % of the cache"
    assert words(headline(poor)) == expected


def test_headline_without_a_baseline_or_with_a_score_of_zero(comparison):
    alone = replace(comparison, rows=comparison.rows[2:])
    assert headline(alone) == "3 methods measured, without full to compare with"
    assert notes(alone) == ("full was not measured, so there are no ratios.",)
    zero = alter(comparison, "full", score=0.0)
    assert words(headline(zero)) == "full scores 0 %; no other method can be compared with it"


def test_about_says_what_ran(comparison):
    expected = (
        "labs/lm answered 4 prompts of length 2,048 from the task needle, "
        "under full and under 4 other methods at a cache budget of 40 %."
    )
    assert words(about(comparison)) == expected
