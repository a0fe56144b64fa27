"""The pages of views in headless Chromium: each view draws, a click on a head shows its map, and all stays inside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.lens import AttentionView, attention_view, attentionviz_matrix
from tests.lens.models import image, text, tiny
from tests.lens.test_view_pages import HOSTILE, random_maps
from tests.report.conftest import IMAGE, SCRIPT
from tests.support.browser import SCHEMES, SIZES, Visit, browser, visits  # noqa: F401  a fixture

pytestmark = pytest.mark.browser

WORDS = [f"word{at} " for at in range(24)]


class View(Visit):
    """The page of a view."""

    def __init__(self, browser: Any, page: str, folder: Path, *screen: Any, **named: Any) -> None:  # noqa: F811
        path = folder / "page.html"
        path.write_text(page, "utf-8")
        super().__init__(browser, path, *screen, **named)
        self.check()

    def head(self, layer: int, head: int) -> None:
        self.page.locator(f".cell[data-layer='{layer}'][data-head='{head}']").click()

    def lines(self) -> list[tuple[int, int, int, float]]:
        """The lines that are drawn: query, key, head and opacity."""
        return [
            (int(query), int(key), int(head), float(opacity))
            for query, key, head, opacity in self(
                "[...document.querySelectorAll('.arcs line')].map(line => [line.dataset.query, line.dataset.key, "
                "line.dataset.head, line.getAttribute('stroke-opacity')])"
            )
        ]

    def inked(self, canvas: str) -> bool:
        """Whether a canvas has pixels of more than one colour."""
        return self(
            f"(() => {{ const canvas = document.querySelector({canvas!r}), {{ width, height }} = canvas; const data = "
            "new Uint32Array(canvas.getContext('2d').getImageData(0, 0, width, height).data.buffer); "
            "return new Set(data).size > 1; })()"
        )


@pytest.fixture
def visit(browser, tmp_path):  # noqa: F811
    yield from visits(lambda page, *screen, **named: View(browser, page, tmp_path, *screen, **named))


def decoder() -> AttentionView:
    return attention_view(tiny("llama"), text(), tokens=WORDS)


@SIZES
@SCHEMES
def test_every_view_draws_and_fits(visit, width, height, scheme):
    view = visit(decoder().html(), width, height, scheme)
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert view("document.querySelectorAll('.cell canvas').length") == 8
    for canvas in (".cell[data-layer='1'][data-head='3'] canvas", "#canvas", ".neurons .strip"):
        assert view.inked(canvas), canvas
    assert len(view.lines()) > 24 and view("document.querySelectorAll('.arc-token').length") == 48
    assert 3 < view("document.querySelectorAll('.neurons tbody tr').length") <= 24
    view.check()


def test_a_click_on_a_head_shows_its_map_and_lines(visit):
    found = decoder()
    view = visit(found.html())
    before = view("document.getElementById('canvas').toDataURL()")
    view.head(1, 2)
    assert view.text("#head") == "Layer 1, head 2" and view.text("#mapsaid").startswith("Layer 1, head 2.")
    assert view("document.getElementById('canvas').toDataURL()") != before
    expected = {line[:3]: line.weight for line in found.head(1, [2]).edges(0.02)}
    drawn = {line[:3]: line[3] for line in view.lines()}
    assert drawn.keys() == expected.keys()
    assert all(drawn[line] == pytest.approx(expected[line], abs=1e-3) for line in drawn)
    weights = found.stack().map(1, 2)
    row, key = divmod(int(weights[8:].argmax()), 24)
    row += 8
    box = view.page.locator("#canvas").bounding_box()
    view.page.locator("#canvas").click(
        position={"x": (key + 0.5) / 24 * box["width"], "y": (row + 0.5) / 24 * box["height"]}
    )
    said = view.text("#cell")
    assert said.startswith(f"Query {row} “{WORDS[row]}” puts ") and said.endswith(f"on key {key} “{WORDS[key]}”.")
    assert float(said.split(" puts ")[1].split()[0]) == pytest.approx(float(weights[row, key]), abs=1e-3)
    view.check()


def test_heads_are_added_and_taken_away(visit):
    found = decoder()
    view = visit(found.head(1, [0, 3]).html())
    assert view.text("#head") == "Layer 1, heads 0, 3" and {line[2] for line in view.lines()} == {0, 3}
    assert view("getComputedStyle(document.querySelector('.arcs line[data-head=\"0\"]')).stroke !== "
                "getComputedStyle(document.querySelector('.arcs line[data-head=\"3\"]')).stroke")  # fmt: skip
    view.page.locator("#chips button", has_text="3").click()
    assert {line[2] for line in view.lines()} == {0}
    view.page.locator("#chips button", has_text="0").click()
    assert {line[2] for line in view.lines()} == {0}, "one head stays"
    view.page.locator("#allheads").click()
    assert {line[2] for line in view.lines()} == {0, 1, 2, 3}
    assert len(view.lines()) == len(found.head(1).edges(0.02))
    view.check()


def test_a_token_shows_its_lines_alone_by_mouse_and_keyboard(visit):
    found = decoder()
    view = visit(found.head(0, [1]).html())
    every = view.lines()
    view.page.locator(".arc-token[data-side='query'][data-at='9']").hover()
    assert {line[0] for line in view.lines()} == {9}
    view.page.locator(".arc-token[data-side='key'][data-at='4']").hover()
    assert {line[1] for line in view.lines()} == {4}
    view.page.mouse.move(2, 2)
    assert view.lines() == every
    view.page.locator(".arc-token[data-side='query'][data-at='9']").click()
    view.page.mouse.move(2, 2)
    assert {line[0] for line in view.lines()} == {9}
    bars = view("[...document.querySelectorAll('.arcs rect')].map(bar => Number(bar.getAttribute('fill-opacity')))")
    row = found.stack().map(0, 1)[9]
    assert bars == pytest.approx([float(each) for each in row if float(each) > 0.002], abs=1e-3)
    assert view.text("#arcsaid").startswith("Query 9 “word9 ”. head 1: ")
    view.page.locator("#arcs").focus()
    view.page.keyboard.press("ArrowDown")
    assert {line[0] for line in view.lines()} == {10} and "query 10 “word10 ”" in view.text("#neuronsaid")
    view.page.keyboard.press("Escape")
    assert view.lines() == every
    view.page.locator(".cell[aria-selected='true']").focus()
    for key in ("ArrowDown", "End"):
        view.page.keyboard.press(key)
    assert view.text("#head") == "Layer 1, head 3"
    view.check()


def test_neurons_are_those_of_the_table(visit):
    found = decoder()
    view = visit(found.head(1, [3]).html())
    view.page.locator(".arc-token[data-side='query'][data-at='7']").click()
    table = found.neuron(1, 3, 7)
    lines = "[...document.querySelectorAll('.neurons tbody tr')]"
    rows = view(f"{lines}.map(row => [...row.cells].map(cell => cell.textContent))")
    keys = [int(row[0].split()[0]) for row in rows]
    assert keys == [key for key, weight in zip(table.keys.tolist(), table.prob.tolist(), strict=True) if weight > 1e-10]
    assert len(keys) > 3 and [row[0] for row in rows] == [f"{key} {WORDS[key]}" for key in keys]
    assert [float(row[3]) for row in rows] == pytest.approx(table.logit[keys].tolist(), abs=2e-3)
    assert [float(row[4]) for row in rows] == pytest.approx(table.prob[keys].tolist(), abs=2e-3)
    neuron, product = table.strongest(keys[2], 1)[0]
    title = view("document.querySelectorAll('.neurons tbody tr')[2].cells[2].firstChild.title")
    assert title.startswith(f"neuron {neuron}: ")
    assert float(title.split(": ")[1].split(",")[0]) == pytest.approx(product, rel=1e-2)
    view.check()


def test_segments_and_search(visit):
    view = visit(attention_view(tiny("bert"), text(), tokens=WORDS, boundary=10).html())
    for name, of_query, of_key in (("A->B", False, True), ("B->B", True, True), ("B->A", True, False)):
        view.page.locator("#segments").select_option(name)
        assert {(line[0] >= 10, line[1] >= 10) for line in view.lines()} == {(of_query, of_key)}
    view.page.locator("#segments").select_option("all")
    view.page.locator("#find").fill("d2")
    assert view.text("#found").startswith("5 places") and view("arcs.row") == 2
    view.page.locator("#find").press("Enter")
    assert view("arcs.row") == 20
    view.check()


def test_parts_of_an_encoder_decoder(visit):
    maps = [random_maps(2, 2, n, m) for n, m in ((12, 12), (7, 7), (7, 12))]
    names = WORDS[:12], [f"out{at}" for at in range(7)]
    three = AttentionView.joined(
        encoder=AttentionView(maps[0], names[0]), decoder=AttentionView(maps[1], names[1]),
        cross=AttentionView(maps[2], names[0], queries=names[1]),
    )  # fmt: skip
    view = visit(three.html())
    view.page.locator("#part").select_option(label="cross")
    assert view("document.querySelectorAll('.arc-token[data-side=\"query\"]').length") == 7
    assert view("document.querySelectorAll('.arc-token[data-side=\"key\"]').length") == 12
    view.head(1, 1)
    drawn = {line[:3]: line[3] for line in view.lines()}
    expected = {line[:3]: line.weight for line in three.head(1, [1], "cross").edges(0.02)}
    first = next(iter(drawn))
    assert drawn.keys() == expected.keys() and drawn[first] == pytest.approx(expected[first], abs=1e-3)
    view("mapped.cell = {row: 6, column: 11}, zoom(8)")
    assert view.text("#cell").startswith("Query 6 “out6” puts ") and "key 11 “word11 ”" in view.text("#cell")
    view.check()


def test_a_vits_map_lies_over_its_image(visit):
    found = attention_view(tiny("vit"), image())
    view = visit(found.head(1, [2]).html())
    assert view.inked("#image") and "query [CLS]:" in view.text("#patchsaid")
    box = view.page.locator("#image").bounding_box()
    view.page.locator("#image").click(position={"x": 2.5 / 4 * box["width"], "y": 1.5 / 4 * box["height"]})
    assert "query 1,2:" in view.text("#patchsaid")
    row = found.stack().map(1, 2)[1 + 4 + 2]
    most = float(view.text("#patchsaid").split("at most ")[1].split()[0])
    assert most == pytest.approx(float(row[1:].max()), abs=1e-3)
    view.page.locator("#image").focus()
    view.page.keyboard.press("ArrowDown")
    assert "query 2,2:" in view.text("#patchsaid")
    view.page.locator("#others button").first.click()
    assert "query [CLS]:" in view.text("#patchsaid")
    view.check()


def test_kept_rows_of_a_look(visit):
    import foveate

    seen = foveate.look(tiny("llama"), text(), keep_maps={(1, 2): [3, -1]})
    view = visit(seen.view(WORDS).html())
    assert view.text("#head") == "Layer 1, head 2" and {line[0] for line in view.lines()} == {0, 1}
    assert view("document.querySelectorAll('.cell.blank').length") == 5
    view.page.locator(".arc-token[data-side='query'][data-at='1']").click()
    assert view.text("#arcsaid").startswith("Query 23 “word23 ”")
    view.head(0, 0)
    assert "No map of layer 0, head 0 was kept" in view.text("#mapsaid")
    assert not view.page.locator("#canvas").is_visible()
    view.check()


def test_a_long_text_lists_one_query(visit):
    maps = random_maps(1, 2, 500)
    view = visit(AttentionView(maps, [f"t{at}" for at in range(500)]).html())
    assert view("document.querySelectorAll('.arc-token[data-side=\"query\"]').length") == 1
    view("pinRow(40)")
    tokens = "[...document.querySelectorAll('.arc-token[data-side=\"key\"]')]"
    keys = view(f"{tokens}.map(token => Number(token.dataset.at))")
    assert keys == sorted(maps[0, 0][40].topk(len(keys)).indices.tolist())
    view.check()


def test_large_pages_open_soon(visit):
    began = time.perf_counter()
    view = visit(AttentionView(random_maps(12, 12, 96), [f"token{at} " for at in range(96)]).html())
    assert view("document.querySelectorAll('.cell canvas').length") == 144
    assert time.perf_counter() - began < 6  # about one second on a free core
    view.check()


# -- queries and keys --------------------------------------------------------------------------------------------------


@SIZES
@SCHEMES
def test_the_joint_page_draws_and_fits(visit, width, height, scheme):
    view = visit(attentionviz_matrix(tiny("llama"), text()).html(), width, height, scheme)
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert view("document.querySelectorAll('.cell canvas').length") == 8
    assert view.inked("#points") and view.inked(".cell[data-layer='1'][data-head='3'] canvas")
    view.check()


def test_a_point_shows_its_token_and_keys(visit):
    seen = attentionviz_matrix(tiny("llama"), text())
    view = visit(seen.html())
    view.head(1, 2)
    assert view.text("#head") == "Layer 1, head 2"
    assert f"{seen.heads[1, 2].measures()['correlation_after']:.3g}"[:5] in view.text("#said")
    x, y = view("placeOf(state.picture, 30, document.getElementById('points').getBoundingClientRect().width)")
    view.page.locator("#points").click(position={"x": x, "y": y})
    query = view("state.query")
    xy = torch.cat([seen.heads[1, 2].q_xy, seen.heads[1, 2].k_xy])
    assert torch.dist(xy[query], xy[30]) < 0.02 * (xy.amax(0) - xy.amin(0)).max()
    view("chooseQuery(30)")
    assert view.text("#readout") == f"Query “{seen.queries.tokens[30]}”, place 6 of text 1."
    strongest = seen.strongest[1, 2]
    first = view.page.locator("#nearest li").first.inner_text()
    assert first.startswith(f"“{seen.keys.tokens[int(strongest.keys[30, 0])]}” ")
    assert float(first.split(": ")[1]) == pytest.approx(float(strongest.weights[30, 0]), abs=1e-3)
    coloured = view("[...document.querySelectorAll('#text .token')].filter(token => token.title).length")
    assert coloured == int((strongest.weights[30] > 1e-5).sum())
    assert view("document.querySelector('#text .current').dataset.place") == "6"
    view.page.locator("#points").focus()
    view.page.keyboard.press("ArrowRight")
    assert view("state.query") == 31
    before = view("document.getElementById('points').toDataURL()")
    for colour in ("place", "norm"):
        view.page.locator("#colour").select_option(colour)
        assert view("document.getElementById('points').toDataURL()") != before
    view.page.locator("#find").fill(seen.queries.tokens[30])
    assert view("state.hits.has(30)") and view.text("#found").endswith("dots")
    view.check()


def test_patches_have_their_colour(visit):
    view = visit(attentionviz_matrix(tiny("vit"), image()).html())
    view.page.locator("#colour").select_option("patch")
    assert view.text("#legend").startswith("The mean colour of each patch")
    view.check()


# -- safety ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOSTILE)
@SIZES
def test_injected_markup_stays_text(visit, kind, width, height):
    view = visit(HOSTILE[kind](), width, height)
    if kind == "view":
        view.page.locator(".arc-token").first.click()
        view("pinRow(0)")
        titles = view("[...document.querySelectorAll('.arc-token title')].map(title => title.textContent).join(' ')")
        assert SCRIPT in titles and IMAGE in titles
        assert SCRIPT in view.text("#arcsaid") + view.text("h1 + .about")
    else:
        view("chooseQuery(0)")
        assert SCRIPT in view.text("#readout") and IMAGE in view.text("#text")
    assert view("window.pwned") is None and view("document.images.length") == 0
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    view.check()


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_policy_stops_scripts_that_escaping_would_not(visit, kind):
    view = visit(HOSTILE[kind]())
    view("document.body.insertAdjacentHTML('beforeend', '<button id=planted onclick=\"window.pwned=1\">x</button>')")
    view.page.locator("#planted").click()
    assert view("window.pwned") is None and any("Content Security Policy" in each for each in view.complaints)


def test_a_notebooks_frame_draws(visit):
    view = visit(f"<!doctype html><title>notebook</title><body>{decoder()._repr_html_()}</body>")
    frame = view.page.frame_locator("iframe")
    frame.locator(".cell[data-layer='1'][data-head='1']").click()
    assert frame.locator("#head").inner_text() == "Layer 1, head 1"
    assert frame.locator(".cell canvas").count() == 8
    assert [each for each in view.complaints if "Error" in each] == []
    assert all(each in (view.address, "about:srcdoc") for each in view.requests)


def test_pictures_follow_the_colour_scheme(visit):
    view = visit(decoder().html())
    pixel = "[...document.getElementById('canvas').getContext('2d').getImageData(760, 8, 1, 1).data].join()"
    before = view(pixel)
    view.page.emulate_media(color_scheme="dark")
    view.page.wait_for_timeout(300)
    assert view(pixel) != before
    view.check()


def test_it_prints_in_light_colours(visit):
    view = visit(decoder().html(), scheme="dark")
    view.page.set_viewport_size({"width": 700, "height": 1000})
    view.page.emulate_media(media="print")
    assert view("getComputedStyle(document.body).color") == "rgb(27, 29, 33)"
    assert view("document.scrollingElement.scrollWidth <= innerWidth")
    assert 1 <= view.page.pdf(format="A4").count(b"/Type /Page\n") <= 12
