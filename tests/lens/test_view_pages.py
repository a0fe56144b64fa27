"""The pages of views: their numbers are the maps', they are small, and texts stay texts."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from foveate.lens import AttentionView, attention_view, attentionviz_matrix
from foveate.lens.views.view_page import Start, payload
from tests.lens.models import image, text, tiny
from tests.report.conftest import ATTACK, IMAGE, SCRIPT
from tests.support.tensors import assert_near


class Page(HTMLParser):
    """A page's tags, texts and JSON."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def json(self) -> Any:
        return json.loads(next(each for each in self.texts if each.startswith('{"')))


def numbers(packed: str, width: int) -> Tensor:
    kind = {1: "<u1", 2: "<u2", 4: "<u4"}[width]
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(packed), kind).astype("float64"))


def weights_of(data: dict[str, Any]) -> Tensor:
    most = 255 if data["width"] == 1 else 65535
    return (numbers(data["tiles"], data["width"]) / most).square().view(data["rows"], data["columns"])


def random_maps(layers: int, heads: int, n: int, m: int | None = None) -> dict[tuple[int, int], Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        (layer, head): torch.randn(n, m or n, generator=draw).mul(3).softmax(-1)
        for layer in range(layers)
        for head in range(heads)
    }


def hostile_view() -> AttentionView:
    view = attention_view(tiny("bert"), text(), tokens=[ATTACK, "\n", "\u2028", *["a"] * 21], boundary=5)
    return AttentionView.of(view.stacks, name=ATTACK)


def test_the_page_has_the_maps_queries_and_keys() -> None:
    view = attention_view(tiny("llama"), text(), tokens=[f"w{at}" for at in range(24)])
    data = Page(view.html()).json()
    part, stack = data["parts"][0], view.stack()
    assert data["start"] == {"part": 0, "layer": 0, "heads": [0]} and part["keys"][3] == "w3"
    assert part["places"] == list(range(24)) and (part["layers"], part["heads"]) == (2, 4)
    for each in part["maps"]:
        assert each["span"] == 1 and each["width"] == 2
        assert_near(weights_of(each), stack.map(each["layer"], each["head"]).double(), 1e-4)
    for layer, products in stack.products.items():
        found = part["products"][str(layer)]
        assert (found["width"], found["groups"]) == (8, 2) and found["scale"] == pytest.approx(8**-0.5)
        for name, values in (("q", products.q), ("k", products.k)):
            most = torch.tensor(found[f"{name}_most"]).double()[:, None, None]
            read = (numbers(found[name], 2) / 65535 * 2 - 1).view(values.shape) * most
            assert (read - values.double()).abs().max() < 1e-4 * float(values.abs().max())


def test_it_opens_at_the_heads_that_were_chosen() -> None:
    view = attention_view(tiny("llama"), text())
    assert Page(view.head(1, [2, 3]).html()).json()["start"] == {"part": 0, "layer": 1, "heads": [2, 3]}
    three = AttentionView.joined(encoder=view, decoder=view, cross=view)
    assert payload(three.stacks, Start("cross", 1, (0,)))["start"]["part"] == 2
    assert Page(three.model("decoder").html()).json()["start"]["part"] == 1
    assert [part["name"] for part in Page(three.html()).json()["parts"]] == ["encoder", "decoder", "cross"]


@pytest.mark.parametrize(("layers", "heads", "n", "m"), [(12, 12, 128, None), (12, 12, 400, None), (32, 32, 96, 200)])
def test_large_views_stay_small(layers: int, heads: int, n: int, m: int | None) -> None:
    maps = random_maps(layers, heads, n, m)
    names = [f"token{at}" for at in range(m or n)]
    view = AttentionView(maps, names, queries=None if m is None else names[:n])
    page = view.html()
    assert len(page.encode()) < 10_000_000
    part = Page(page).json()["parts"][0]
    last = part["maps"][-1]
    span, whole = last["span"], maps[layers - 1, heads - 1]
    found = weights_of(last)
    assert last["rows"] == -(-n // span) and last["columns"] == -(-(m or n) // span)
    expected = whole[:span, :span].sum(-1).mean()
    assert float(found[0, 0]) == pytest.approx(float(expected), abs=0.01)
    assert_near(found[:-1].sum(-1), torch.ones(len(found) - 1).double(), 0.1)


def test_one_row_of_a_long_text() -> None:
    weights = torch.zeros(1, 40_000)
    weights[0, [5, 39_999]] = torch.tensor([0.25, 0.75])
    view = AttentionView({(3, 1): weights}, [str(at) for at in range(40_000)], places=[39_999])
    page = view.html()
    assert len(page) < 2_000_000
    (found,) = Page(page).json()["parts"][0]["maps"]
    assert (found["rows"], found["columns"], found["span"]) == (1, 40_000, 1)


def test_strongest_keys_stand_beside_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.lens.views.view_page.MAPS", 2_000)
    maps = random_maps(1, 1, 100)
    part = payload({"": AttentionView(maps, ["x"] * 100).stack()})["parts"][0]
    (found,) = part["maps"]
    assert found["span"] == 3 and found["rows"] == 34 and found["count"] == 8 and found["width"] == 1
    keys = numbers(found["keys"], 2).view(100, 8).long()
    expected = maps[0, 0].sort(descending=True)
    assert torch.equal(keys[40], expected.indices[40, :8])
    shown = (numbers(found["weights"], 2) / 65535).square().view(100, 8)
    assert_near(shown[40], expected.values[40, :8].double(), 1e-4)


def test_large_neurons_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.lens.views.view_page.NEURONS", 100)
    part = Page(attention_view(tiny("llama"), text()).html()).json()["parts"][0]
    assert part["products"] == {} and part["left_out"] is True


def test_an_image_is_kept_in_its_proportions() -> None:
    view = attention_view(tiny("vit"), image())
    part = payload(view.stacks)["parts"][0]
    assert part["grid"] == (4, 4) and (part["image"]["width"], part["image"]["height"]) == (32, 32)
    pixels = (numbers(part["image"]["data"], 1) / 255).view(32, 32, 3).permute(2, 0, 1)
    stack = view.stack()
    assert stack.image is not None and (pixels - stack.image).abs().max() < 1 / 255


def test_the_joint_page_has_the_pictures() -> None:
    seen = attentionviz_matrix(tiny("llama"), text())
    page = seen.html()
    assert len(page) < 400_000
    data = Page(page).json()
    assert data["same"] and len(data["texts"]) == 2 and data["queries"]["place"][24:27] == [0, 1, 2]
    each, found = data["pictures"][5], seen.heads[1, 1]
    assert (each["layer"], each["head"]) == (1, 1)
    assert each["measures"]["correlation_after"] == pytest.approx(found.measures()["correlation_after"], rel=1e-6)
    drawn = (numbers(each["xy"], 2) / 65535).view(96, 2)
    both = torch.cat([found.q_xy, found.k_xy]).double()
    assert_near(torch.cdist(drawn, drawn) * float((both.amax(0) - both.amin(0)).max()), torch.cdist(both, both), 1e-3)
    keys = numbers(each["neighbours"], 2).view(48, 8) - 1
    assert torch.equal(keys.long(), seen.strongest[1, 1].keys)


HOSTILE = {
    "view": lambda: hostile_view().html(),
    "joint": lambda: attentionviz_matrix(tiny("llama"), text()["input_ids"], tokenizer=Attacker()).html(),
}


class Attacker:
    """A tokenizer whose tokens attack the page."""

    def decode(self, ids: list[int], **options: bool) -> str:
        return ATTACK * len(ids)


@pytest.mark.parametrize("kind", HOSTILE)
def test_texts_stay_texts(kind: str) -> None:
    page = HOSTILE[kind]()
    parsed = Page(page)
    assert SCRIPT not in page and IMAGE not in page and "\x1b" not in page and "\u202e" not in page
    assert "img" not in {tag for tag, _ in parsed.tags} and "b" not in {tag for tag, _ in parsed.tags}
    assert SCRIPT in json.dumps(parsed.json()), "it is there, as a text"


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_page_names_no_other_address(kind: str) -> None:
    parsed = Page(HOSTILE[kind]())
    assert not re.findall(r"https?:|url\(|@import|fetch\(|import\(|XMLHttpRequest|innerHTML", "".join(parsed.texts))
    assert not [attrs for _, attrs in parsed.tags if attrs.keys() & {"src", "action", "onclick"}]
    assert [attrs["href"] for _, attrs in parsed.tags if "href" in attrs] == ["data:,"]
    policy = next(attrs["content"] for _, attrs in parsed.tags if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")


def test_a_notebook_gets_the_page_as_a_frame(tmp_path: Path) -> None:
    view = attention_view(tiny("llama"), text())
    for shown, page in (
        (view._repr_html_(), view.html()), (view.head(1)._repr_html_(), view.head(1).html()),
        (view.model()._repr_html_(), view.model().html()),
    ):  # fmt: skip
        (frame,) = Page(shown).tags
        assert frame[0] == "iframe" and frame[1]["sandbox"] == "allow-scripts" and frame[1]["srcdoc"] == page
    seen = attentionviz_matrix(tiny("llama"), text())
    assert html.escape(seen.html()) in seen._repr_html_()
    for each, name in ((view, "a"), (view.head(0), "b"), (view.model(), "c"), (seen, "d")):
        assert each.save(tmp_path / name).read_text("utf-8") == each.html()  # type: ignore[attr-defined]
