"""The page of a study in headless Chromium: it fits, is legible in both colour schemes, and makes no requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.core.catalog import system
from foveate.report.study import write
from tests.contracts.studies import Coins
from tests.report.test_browser import SCHEMES, SIZES, browser  # noqa: F401  a fixture

pytestmark = pytest.mark.browser


@SIZES
@SCHEMES
def test_the_page_fits_and_is_silent(browser, tmp_path: Path, width: int, height: int, scheme: str) -> None:  # noqa: F811
    address = write(system("scan_and_snap"), Coins().run(), tmp_path / "study.html").as_uri()
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    assert complaints == [] and requests == [address]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawing = page.locator("svg").bounding_box()
    assert 0 < drawing["width"] <= width and drawing["height"] > 100
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('svg')).fill, getComputedStyle(document.body).backgroundColor]"
    )
    assert ink == page.evaluate("getComputedStyle(document.body).color") != paper
    lines = "cell => { const r = document.createRange(); r.selectNodeContents(cell); return r.getClientRects().length }"
    assert page.evaluate(f"[...document.querySelectorAll('td.verdict')].map({lines})") == [1, 1]
    page.close()
