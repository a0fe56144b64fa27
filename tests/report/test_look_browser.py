"""The page of `foveate look` in headless Chromium: it shows the lens's values, by mouse and by keyboard, and fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.bench.looking import Looked
from foveate.lens.views.head_map import pooled
from foveate.report.look import write
from tests.report.test_look_page import IMAGE, SCRIPT, hostile, made, surveyed
from tests.support.browser import SCHEMES, SIZES, Visit, browser, visits  # noqa: F401  a fixture

pytestmark = pytest.mark.browser


class Look(Visit):
    """The page of what was looked at."""

    def __init__(self, browser: Any, found: Looked, folder: Path, *screen: Any) -> None:  # noqa: F811
        super().__init__(browser, write(found, folder / "look.html"), *screen)
        self.check()

    def tokens(self) -> list[float]:
        """The numbers that the tokens show, in order."""
        return [float(title) for title in self("[...document.querySelectorAll('.token')].map(token => token.title)")]

    def pixel(self, x: int, y: int) -> list[int]:
        return self(f"[...document.getElementById('canvas').getContext('2d').getImageData({x}, {y}, 1, 1).data]")


@pytest.fixture
def visit(browser, tmp_path):  # noqa: F811
    yield from visits(lambda found, *screen: Look(browser, found, tmp_path, *screen))


@SIZES
@SCHEMES
def test_the_page_renders_and_fits(visit, width, height, scheme):
    view = visit(made(32, 32, 300), width, height, scheme)
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert view("document.querySelectorAll('.cell').length") == 32 * 32
    assert view("document.querySelectorAll('.token').length") == 300
    cell = view.page.locator(".cell").nth(700)
    assert cell.bounding_box()["width"] >= 7
    paper, darkest = ([int(text[at : at + 2], 16) for at in (1, 3, 5)] for text in (
        view("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()"),
        view("getComputedStyle(document.documentElement).getPropertyValue('--accent').trim()"),
    ))  # fmt: skip
    assert view.pixel(760, 8)[:3] == paper, "no query sees later keys"
    assert paper != darkest and sum(paper) > sum(darkest) if scheme == "light" else sum(paper) < sum(darkest)


def test_cells_and_tokens_show_the_values_of_the_lens(visit):
    found = made()
    view = visit(found)
    for index, measure in enumerate(found.measures):
        view.page.locator("#measure").select_option(str(index))
        assert measure.name in view.text("#meaning")
        for layer, head in ((1, 2), (0, 0)):
            label = view.page.locator(f".cell[data-layer='{layer}'][data-head='{head}']").get_attribute("aria-label")
            assert label == f"layer {layer}, head {head}: {measure.name} {float(label.split()[-1]):g}"
            assert float(label.split()[-1]) == pytest.approx(measure.table[layer, head].item(), rel=1e-3)
            view.page.locator(f".cell[data-layer='{layer}'][data-head='{head}']").click()
            assert view.text("#head") == f"Layer {layer}, head {head}"
            shown = torch.tensor(view.tokens())
            assert (shown - measure.values[layer, head]).abs().max() < 1e-3 * measure.values[layer, head].max()
    shares = view(
        "[...document.querySelectorAll('.token')].map(token => parseFloat(token.style.getPropertyValue('--share')))"
    )
    order = torch.tensor(shares).argsort().tolist()
    assert order == measure.values[0, 0].argsort().tolist() and min(shares) == 0 and max(shares) == 100


def test_heads_and_tokens_by_keyboard(visit):
    found = made()
    view = visit(found)
    view.page.locator(".cell[aria-selected='true']").focus()
    for key in ("Home", "ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown"):
        view.page.keyboard.press(key)
    assert view.text("#head") == "Layer 1, head 1"
    assert (
        view("document.activeElement.dataset.head") == "1"
        and view("document.querySelectorAll('.cell[tabindex=\"0\"]').length") == 1
    )
    view.page.locator("#text").focus()
    for _ in range(4):
        view.page.keyboard.press("ArrowRight")
    said = view.text("#readout")
    assert said.startswith("Token 3 “word3 ”: entropy ")
    assert float(said.split()[-1].rstrip(".")) == pytest.approx(found.measures[0].values[1, 1, 3].item(), rel=1e-3)


def test_search_marks_words_of_several_tokens(visit):
    view = visit(made(tokens=["The ", "gar", "bage", " can. ", "Garb", "age", *["x"] * 14], prompt=18))
    view.page.locator("#find").fill("garbage")
    assert view("[...document.querySelectorAll('.hit')].map(token => token.dataset.index)") == ["1", "2", "4", "5"]
    assert view.text("#found").startswith("2 places")
    for wanted in ("1", "4", "1"):
        view.page.locator("#find").press("Enter")
        assert view("document.querySelector('.current').dataset.index") == wanted
    view.page.locator("#find").fill("zebra")
    assert view.text("#found").startswith("no places") and view("document.querySelectorAll('.hit').length") == 0
    assert view("document.querySelectorAll('.token.new').length") == 2


def test_a_map_of_single_tokens_shows_weights(visit):
    found = made(n=32)
    view, wanted = visit(found), found.maps[0].tiles
    assert view.text("#mapsaid").endswith("A cell is the weight of one query on one key.")
    box = view.page.locator("#canvas").bounding_box()
    row, column = divmod(int(wanted[8:24, 4:20].argmax()), 16)
    row, column = row + 8, column + 4
    view.page.mouse.move(0, 0)
    view.page.locator("#canvas").click(
        position={"x": (column + 0.5) / 32 * box["width"], "y": (row + 0.5) / 32 * box["height"]}
    )
    said = view.text("#cell")
    assert said.startswith(f"Query {row} “word{row} ” puts ") and said.endswith(f"on key {column} “word{column} ”.")
    assert float(said.split(" puts ")[1].split()[0]) == pytest.approx(wanted[row, column].item(), abs=0.01)
    assert view("mapped.view.size") == 8 and view("mapped.view.row") <= row < view("mapped.view.row + 8")
    view.page.keyboard.press("ArrowLeft")
    assert view.text("#cell").endswith(f"on key {column - 1} “word{column - 1} ”.")
    view.page.keyboard.press("Escape")
    assert view("mapped.view.size") == 32
    view.page.locator(".cell[data-layer='1'][data-head='0']").click()
    assert "--heads 1.0 keeps it" in view.text("#mapsaid") and not view.page.locator("#canvas").is_visible()
    view.page.locator("#mapped button").first.click()
    assert view.text("#head") == "Layer 0, head 0" and view.page.locator("#canvas").is_visible()


def test_a_pooled_map_lists_the_strongest_pairs(visit):
    n = 600
    weights = torch.full((n, n), 1e-4).tril()
    weights[500, 7] = 0.9
    view = visit(replace(made(n=n), maps=[pooled(0, 0, weights)]))
    assert "3 keys" in view.text("#mapsaid")
    view("mapped.cell = {row: 166, column: 2}, zoom(8)")
    assert view.text("#cell").startswith("Queries 498–500 ")
    assert view.page.locator("#pairs li").first.inner_text() == "“word500 ” (500) → “word7 ” (7): 0.9"
    view("chooseToken(500)")
    assert "It looks most at “word7 ” (7) 0.9" in view.text("#readout")


@SIZES
def test_injected_markup_stays_text(visit, width, height):
    view = visit(hostile(), width, height)
    view.page.locator(".token").first.click()
    assert view("window.pwned") is None and view("document.images.length") == 0
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert SCRIPT in view.text("#text") and IMAGE in view.text("#text")
    assert view.complaints == [] and view.requests == [view.address]


def test_the_policy_stops_scripts_that_escaping_would_not(visit):
    view = visit(made())
    view("document.body.insertAdjacentHTML('beforeend', '<button id=planted onclick=\"window.pwned=1\">x</button>')")
    view.page.locator("#planted").click()
    assert view("window.pwned") is None and any("Content Security Policy" in text for text in view.complaints)


def test_the_map_follows_the_colour_scheme(visit):
    view = visit(made())
    before = view.pixel(760, 8)
    view.page.emulate_media(color_scheme="dark")
    view.page.wait_for_timeout(300)
    assert view.pixel(760, 8) != before and view.complaints == []


def test_lines_of_a_kept_head(visit):
    """BertViz's head view beside the map: a token's lines by click, linked with the text above."""
    found = made(n=20)
    view = visit(found)
    lines = (
        "[...document.querySelectorAll('.arcs line')].map(({ dataset }) => [dataset.query, dataset.key].map(Number))"
    )
    weights = found.maps[0].tiles
    assert sorted(map(tuple, view(lines))) == [tuple(each) for each in (weights > 0.02).nonzero().tolist()]
    view.page.locator(".arc-token[data-side='query'][data-at='7']").click()
    assert view.text("#readout").startswith("Token 7 “word7 ”") and {row for row, _ in view(lines)} == {7}
    view.page.locator(".token").nth(9).click()
    assert {row for row, _ in view(lines)} == {9}
    view.page.locator(".cell[data-layer='1'][data-head='0']").click()
    assert not view.page.locator("#arcs").is_visible()
    assert view.complaints == []


def test_many_texts_show_means_with_their_spread(visit):
    found = surveyed()
    view = visit(found)
    survey = found.over.survey
    view.page.locator(".cell[data-layer='1'][data-head='2']").click()
    said = view.text("#said")
    assert said.startswith(f"entropy {survey.value[0, 1, 2]:.4g}"[:12]) and "of the first text" in said
    assert f"standard deviation over texts {survey.spread[0, 1, 2].item():.4g}"[:34] in said
    label = view.page.locator(".cell[data-layer='1'][data-head='2']").get_attribute("aria-label")
    assert "standard deviation over texts" in label
