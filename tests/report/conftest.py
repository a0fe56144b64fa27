"""A realistic comparison, and one whose texts all attack the page."""

from __future__ import annotations

import math

import pytest

from foveate.bench.comparison.results import Answer, Comparison, Row

SCRIPT = "<script>window.pwned=1</script>"
IMAGE = "<img src=x onerror=window.pwned=2>"
MARKUP = SCRIPT + IMAGE + "</script><!--<b>bold</b>&lt;i&gt;"
TEMPLATE = "\"'`${7*7}{{7*7}}{% raw %}%{x}"
CONTROLS = "\x00\x1b[31m\x9b31m\u202egnp\udc80"
ATTACK = MARKUP + TEMPLATE + CONTROLS


@pytest.fixture
def comparison() -> Comparison:
    return make_comparison(
        # method, score, cache kept, keys read, prefill ms, decode ms, memory MB, options
        ("sink_recent", 0.25, 0.375, 0.375, 81.0, 3.2, 71.3, {"sink": 4, "recent": 380}),
        ("full", 1.0, 1.0, 1.0, 82.1, 4.13, 98.2, {}),
        ("duo_attention", 1.0, 0.312, 0.305, 84.4, 3.05, 69.0, {"arxiv": "2410.10819", "heads": [[1, 0], [0, 1]]}),
        ("token_select", 1.0, 1.0, 0.33, 88.0, 4.9, 99.1, {"keep": 256}),
        ("act_calibration", 0.75, 1.0, 1.0, 140.3, 9.8, 1310.0, {"arxiv": "javascript:alert(1)"}),
    )


@pytest.fixture
def hostile() -> Comparison:
    """Build a comparison with attacks in every text, numbers that are not finite, and names without line breaks."""
    answers = [
        Answer(ATTACK * 40, ATTACK, ATTACK * 40, score, 9, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, ATTACK if score == 0.5 else "")
        for score in (0.0, 1.0, 0.5, math.nan)
    ]
    numbers = [(0.5, 0.4, 0.3, 2.0, 1.0, 9.0), (math.nan, math.inf, -math.inf, math.nan, 0.0, 1e12)]
    rows = [Row("full", ATTACK, {}, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, answers)]
    rows += [
        Row(ATTACK, ATTACK, {ATTACK: ATTACK, "arxiv": ATTACK}, *values, *values[-1:] * 2, answers, ATTACK)
        for values in numbers
    ]
    rows.append(Row("m" * 200, "t" * 400, {"o" * 90: "v" * 900}, 0.5, 0.5, 0.5, 3.0, 2.0, 9.0, 9.0, 9.0, answers))
    rows.append(Row.failed(ATTACK, ATTACK, ATTACK))
    return Comparison(ATTACK, ATTACK, 0, ATTACK, ATTACK, [0.4], 2, None, {ATTACK: ATTACK}, rows)


def make_comparison(*rows: tuple, **more) -> Comparison:
    base = next(row for row in rows if row[0] == "full")
    built = []
    for name, *values, options in rows:
        given = answers(values[0], values[3:5], base[4:6])
        built.append(Row(name, f"The paper on {name}", options, *values, values[-1] / 2, values[-1] * 2, given))
    settings = dict(model="labs/lm", task="needle", seed=0, device="cpu", dtype="float32", budgets=[0.4], examples=4)
    versions = {"foveate": "0.1.0", "torch": "2.13.0"}
    return Comparison(**{**settings, "length": 2048, "versions": versions, "rows": built, **more})


def answers(score: float, own: list[float], base: tuple[float, float]) -> list[Answer]:
    """Create four answers with times in even steps around the row's."""
    filler = "The collector runs when allocations exceed a threshold. " * 20
    given = []
    for index, factor in enumerate((0.97, 0.99, 1.01, 1.03)):
        right = index < round(4 * score)
        prompt = f"{filler}The pass key of maple is 4711{index}. {filler}\nThe pass key of maple is"
        times = [factor * time for time in own] + list(base)
        output = f" 4711{index}." if right else " 00000."
        given.append(Answer(prompt, f" 4711{index}", output, float(right), 300, 0.3, 0.3, *times))
    return given
