"""The pages of training and recall in headless Chromium: no parts overlap, on wide or narrow screens."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from foveate.bench.recall_figure import Point
from foveate.report import curves
from foveate.train.loop.loop import History
from tests.support.browser import browser  # noqa: F401  a fixture

pytestmark = pytest.mark.browser

PARTS = (".gtitle", ".legend", ".xtitle", ".ytitle", ".y2title", ".cartesianlayer .bg, .bglayer .bg, .gridlayer")
BOXES = """name => [...document.querySelectorAll(name)].map(part => part.getBoundingClientRect())
    .filter(box => box.width).map(box => [box.left, box.top, box.right, box.bottom])"""


def history(seed: int) -> History:
    losses = [4.0 / (1 + step / 30) + 0.1 * ((step * 7 + seed) % 5) for step in range(300)]
    return History(losses, {step: step / 320 + 0.01 * seed for step in range(30, 301, 30)})


def loss(path: Path) -> Path:
    return curves.loss({0: history(0)}, "dual_attention_transformer on mqar", path)


def seeds(path: Path) -> Path:
    return curves.loss({seed: history(seed) for seed in range(5)}, "softmax on lm", path)


def recall(path: Path) -> Path:
    families = ("attention", "window", "based", "linear", "memory")
    points = [
        Point(f"network {i}", family, 1e-3, 10, 1000 * 4**i, i / 5, i / 5, 1.0)
        for i, family in enumerate(families)
    ]  # fmt: skip
    return curves.recall(points, "Recall of 32 pairs in 128 tokens against state", path)


@pytest.mark.parametrize(
    ("write", "width", "height"), [(loss, 1280, 900), (loss, 390, 844), (seeds, 390, 844), (recall, 390, 844)]
)
def test_parts_do_not_overlap(browser, tmp_path: Path, write, width: int, height: int) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": height})
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    address = write(tmp_path / "page.html").as_uri()
    page.goto(address)
    page.wait_for_selector(".legend text")
    page.wait_for_timeout(300)
    boxes = {name: found[0] for name in PARTS if (found := page.evaluate(BOXES, name))}
    assert {".gtitle", ".legend", ".xtitle", PARTS[-1]} <= boxes.keys()
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one} {a} covers {other} {b}"
    for name, (left, top, right, bottom) in boxes.items():
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, name
    assert requests == [address]
    page.close()
