"""The page in headless Chromium: it renders, fits, makes no requests, and runs no injected script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foveate.bench.comparison.results import Comparison, Row
from foveate.report.html import write
from tests.support.browser import SCHEMES, SIZES, Visit, browser, visits  # noqa: F401  a fixture

pytestmark = pytest.mark.browser

SCRIPT = "<script>window.pwned=1</script>"
IMAGE = "<img src=x onerror=window.pwned=2>"


class Report(Visit):
    """A comparison's page, whose plots are drawn."""

    def __init__(self, browser: Any, comparison: Comparison, folder: Path, *screen: Any) -> None:  # noqa: F811
        super().__init__(browser, write(comparison, folder / "report.html"), *screen)
        self.wait("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))")


@pytest.fixture
def visit(browser, tmp_path):  # noqa: F811
    yield from visits(lambda page, *screen: Report(browser, page, tmp_path, *screen))


@SIZES
@SCHEMES
def test_the_page_renders_and_fits(visit, comparison, width, height, scheme):
    view = visit(comparison, width, height, scheme)
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert view("document.querySelectorAll('table.results tbody tr').length") == 5
    assert view("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg'))")
    assert view("document.querySelectorAll('#plot-cost .bars .point').length") == 4 * 3
    for panel in ("cache_kept", "keys_read"):
        assert view(f"document.querySelectorAll('#plot-{panel} .points path').length") == 5
    assert view("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert view.complaints == []
    assert view.requests == [view.address]


@SIZES
def test_injected_markup_stays_text(visit, hostile, width, height):
    view = visit(hostile, width, height)
    assert view("window.pwned") is None
    assert view("document.images.length") == 0
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    shown = view("document.body.textContent")
    assert SCRIPT in shown and IMAGE in shown
    # In the figures too, where names are shortened.
    labels = view("[...document.querySelectorAll('.plot svg text')].map(text => text.textContent).join(' ')")
    assert SCRIPT[:25] in labels
    assert view.complaints == []
    assert view.requests == [view.address]


def test_hover_texts_of_hostile_names_are_text(visit, hostile):
    view = visit(hostile)
    mark = view.page.locator("#plot-cache_kept .points path").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    view.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    view.page.wait_for_selector("#plot-cache_kept .hovertext")
    assert "score" in view("document.querySelector('#plot-cache_kept .hovertext').textContent")
    assert view("window.pwned") is None and view.complaints == []


def test_the_policy_stops_scripts_that_escaping_would_not(visit, comparison):
    view = visit(comparison)
    view("document.body.insertAdjacentHTML('beforeend', '<button id=planted onclick=\"window.pwned=1\">x</button>')")
    view("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned=2'}))")
    view.page.locator("#planted").click()
    assert view("window.pwned") is None
    assert view.requests == [view.address] and any("Content Security Policy" in text for text in view.complaints)


@SIZES
def test_labels_do_not_overlap(visit, comparison, width, height):
    view = visit(comparison, width, height)
    boxes = view(
        "[...document.querySelectorAll('#plot-cache_kept .annotation-text')].map(text => {"
        " const box = text.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })"
    )
    assert len(boxes) == 4  # full and token_select share a position and a label
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left and right <= width
        for other in boxes[:index]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_prompts_open_and_their_answer_is_marked(visit, comparison):
    view = visit(comparison)
    assert not view.page.locator("details pre").first.is_visible()
    view.page.locator("details:has(> pre) > summary").first.click()
    assert view.page.locator("details pre").first.is_visible()
    assert view.page.locator("details pre mark").first.inner_text() == "47111"
    assert "characters left out" in view.page.locator("details pre").first.inner_text()


@pytest.mark.parametrize("which", ["comparison", "hostile"])
def test_the_page_prints_well(visit, which, request):
    """On A4 the page is light, and every column and figure fits the margins, also with a dark screen."""
    found = request.getfixturevalue(which)
    found.rows.append(Row.failed("gta", "GTA", "head_dim=7 must be even"))
    view = visit(found, 1280, 900, "dark")
    width = round((210 - 2 * 12) / 25.4 * 96)  # within the margins
    view.page.set_viewport_size({"width": width, "height": 1000})
    view.page.emulate_media(media="print")
    view.wait("[...document.querySelectorAll('.plot svg.main-svg')].every(svg => svg.clientWidth <= innerWidth)")
    assert view("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#fdfdfc"
    assert view("getComputedStyle(document.body).color") == "rgb(27, 29, 33)"
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    cells = "[...document.querySelectorAll('table.results tr > *')]"
    assert view(f"{cells}.every(cell => cell.getBoundingClientRect().right <= innerWidth + 1)")
    assert view(f"{cells}.every(cell => cell.scrollWidth <= cell.clientWidth + 1)")
    assert view("document.querySelectorAll('table.results thead th').length") == 7
    pages = view.page.pdf(format="A4").count(b"/Type /Page\n")
    assert 1 <= pages <= (8 if which == "comparison" else 60)


def test_figures_follow_the_colour_scheme_and_the_width(visit, comparison):
    view = visit(comparison)
    colour = "document.querySelector('#plot-cost .bars path').style.fill"
    before = view(colour)
    view.page.emulate_media(color_scheme="dark")
    view.wait(f"{colour} !== '{before}'")
    view.page.set_viewport_size({"width": 390, "height": 844})
    view.wait("document.querySelector('#plot-cost svg').clientWidth < 390")
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert view.complaints == []
