"""The page of `foveate look`: its numbers are those of the lens, it is small, and texts stay texts."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from foveate.bench.looking import Looked, Measured
from foveate.lens import MEASURES, Role
from foveate.lens.parts.pieces import PART, pieces
from foveate.lens.views.head_map import pooled
from foveate.report import look as report
from foveate.report.look_data import payload
from tests.report.conftest import ATTACK, IMAGE, SCRIPT
from tests.support.tensors import assert_near


def made(layers: int = 2, heads: int = 3, n: int = 20, maps: int = 1, **changes: Any) -> Looked:
    """Build a look with random numbers: entropies of queries, and heavy-tailed values of keys."""
    draw = torch.Generator().manual_seed(0)
    queries = torch.rand(layers, heads, n, generator=draw) * 5
    keys = torch.rand(layers, heads, n, generator=draw)
    keys[..., 0] = n
    weights = torch.rand(n, n, generator=draw).tril().pow(6)
    weights = weights / weights.sum(-1, keepdim=True)
    first = pooled(0, 0, weights)
    given = {
        "model": "some/model", "tokens": [f"word{i} " for i in range(n)], "prompt": n,
        "measures": [
            Measured("entropy", "queries", queries.mean(-1), queries),
            Measured("sink_mass", "queries", queries.mean(-1) / 5, queries / 5),
            Measured("received_mass", "keys", keys.amax(-1) / keys.sum(-1), keys),
        ],
        "maps": [replace(first, head=head) for head in range(maps)],
    }  # fmt: skip
    return Looked(**{**given, **changes})


def numbers(text: str, width: int) -> Tensor:
    kind = {1: "<u1", 2: "<u2"}[width]
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(text), kind).astype("float64"))


def read(data: dict[str, Any], index: int) -> Tensor:
    """Read a measure's values back, as the page's script does."""
    measure = data["measures"][index]
    share = numbers(measure["data"], data["width"]) / (255 if data["width"] == 1 else 65535)
    low, high = (
        torch.tensor([[torch.nan if each is None else each for each in row] for row in measure[name]]).double()[
            ..., None
        ]
        for name in ("low", "high")
    )
    return low + (high - low) * share.view(data["layers"], data["heads"], -1) ** measure["power"]


class Page(HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def json(self, name: str) -> Any:
        return json.loads(next(text for (tag, attrs), text in self._scripts() if attrs.get("id") == name))

    def _scripts(self):
        scripts = [each for each in self.tags if each[0] == "script"]
        bodies = [text for text in self.texts if text.startswith(("{", "[", '"use strict"'))]
        return zip(scripts, bodies, strict=True)


def test_values_are_those_of_the_look() -> None:
    found = made()
    data = Page(report.render(found)).json("look")
    assert data["width"] == 2 and data["group"] == 1
    for index, measure in enumerate(found.measures):
        assert_near(read(data, index), measure.values.double(), 2e-4, measure.name)
        assert_near(torch.tensor(data["measures"][index]["table"]), measure.table, 1e-6)
    first, wanted = data["maps"][0], found.maps[0]
    assert_near((numbers(first["tiles"], 2) / 65535).square().view(20, 20), wanted.tiles.double(), 1e-4)
    assert_near((numbers(first["weights"], 2) / 65535).square().view(20, 8), wanted.weights.double(), 1e-4)
    assert [int(key) for key in numbers(first["keys"], 2)] == wanted.keys.flatten().tolist()


def test_a_long_text_on_a_large_model_stays_under_ten_megabytes() -> None:
    found = made(32, 32, 4096, maps=4)
    text = report.render(found)
    assert len(text.encode()) < 10_000_000
    data = Page(text).json("look")
    assert data["width"] == 1 and data["group"] == 2
    tiles = (numbers(data["maps"][3]["tiles"], 1) / 255).square().view(256, 256)
    assert (tiles - found.maps[3].tiles).abs().max() < 1 / 255
    pairs = found.measures[0].values.double().unflatten(-1, (-1, 2)).mean(-1)
    assert (read(data, 0) - pairs).abs().max() < 5 / 500
    one = payload(made(32, 32, 4096, maps=0, measures=found.measures[:1]))
    assert one["group"] == 1 and one["width"] == 1
    assert (read(one, 0) - found.measures[0].values).abs().max() < 5 / 500


def test_small_values_of_keys_stay_apart_from_the_largest() -> None:
    """Mass on a sink is thousands of times that of other tokens, which still differ in one byte each."""
    found = made(1, 1, 4000, maps=0)
    keys = found.measures[2]
    data = payload(found)
    data |= {"width": 1, "measures": [payload_of_one_byte(keys)]}
    ours = read(data, 0)[0, 0, 1:]
    wanted = keys.values[0, 0, 1:].double()
    big = wanted > 0.05
    assert ((ours / wanted)[big] - 1).abs().max() < 0.15


def payload_of_one_byte(measure: Measured) -> dict[str, Any]:
    from foveate.report.look_data import _measure

    return _measure(measure, 1, 1)


def test_layers_that_are_not_seen_are_empty() -> None:
    found = made(unseen={1: "another method <b>replaced</b> it"})
    for measure in found.measures:
        measure.table[1], measure.values[1] = torch.nan, torch.nan
    page = Page(report.render(found))
    data = page.json("look")
    assert data["measures"][0]["table"][1] == [None] * 3 and data["measures"][0]["low"][1] == [None] * 3
    assert_near(read(data, 0)[0], found.measures[0].values[0].double(), 2e-4)
    assert any("another method <b>replaced</b> it" in text for text in page.texts)
    assert all(name.startswith("0.") for name in report.extremes(found.measures[0])[0].split(", "))


def test_pooling_keeps_mass() -> None:
    """A tile is what its queries put on its keys, on average; the last tiles are narrower."""
    n = 1000
    weights = torch.rand(n, n, generator=torch.Generator().manual_seed(1)).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    found = pooled(1, 2, weights)
    assert found.span == 4 and found.tiles.shape == (250, 250)
    assert_near(found.tiles.sum(-1), torch.ones(250), 1e-5)
    assert found.tiles[100, 7] == pytest.approx(weights[400:404, 28:32].sum(-1).mean().item(), rel=1e-5)
    odd = pooled(1, 2, weights[:998, :998])
    assert odd.tiles.shape == (250, 250)
    assert odd.tiles[-1, -1] == pytest.approx(weights[996:998, 996:998].sum(-1).mean().item(), rel=1e-5)
    assert (found.keys[50] == weights[50].argsort(descending=True)[:8]).all()
    assert_near(found.weights[50], weights[50].sort(descending=True).values[:8], 1e-6)


def test_extremes_are_in_order() -> None:
    table = torch.tensor([[0.5, torch.nan, 0.1], [0.9, 0.3, 0.7]])
    largest, smallest = report.extremes(Measured("entropy", "queries", table, table[..., None]))
    gap = "\N{NO-BREAK SPACE}"
    assert largest == f"1.0{gap}(0.9), 1.2{gap}(0.7), 0.0{gap}(0.5), 1.1{gap}(0.3)"
    assert smallest == f"0.2{gap}(0.1), 1.1{gap}(0.3), 0.0{gap}(0.5), 1.2{gap}(0.7)"


def test_every_measure_has_a_meaning() -> None:
    assert set(report.MEANINGS) == set(MEASURES)


def hostile() -> Looked:
    return made(
        model=ATTACK, tokens=[ATTACK, "\n", "\u2028", *["a"] * 17], unseen={0: ATTACK}, settings={ATTACK: ATTACK},
        roles=[Role(0, 1, ATTACK, 0.9, 0.5, ATTACK)],
    )  # fmt: skip


def test_texts_stay_texts() -> None:
    text = report.render(hostile())
    page = Page(text)
    assert SCRIPT not in text and IMAGE not in text
    assert [tag for tag, _ in page.tags].count("script") == 2 + 6 and "img" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in text and "\u202e" not in text
    assert page.json("look")["tokens"][0].startswith(SCRIPT + IMAGE)


def test_the_page_names_no_other_address() -> None:
    text = report.render(made(roles=[]))
    page = Page(text)
    assert not re.findall(r"https?:|url\(|@import|fetch\(|import\(", "".join(page.texts))
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "action", "onclick"}]
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["data:,"]
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert any("No head has a role" in text for text in page.texts)


class Bytes:
    """A tokenizer of bytes, which drops a space at the start of a text as SentencePiece does."""

    def decode(self, ids: list[int], **options: bool) -> str:
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")


def test_tokens_keep_their_spaces_and_characters_come_whole() -> None:
    found = pieces(Bytes(), list("a bé €\n".encode()))
    assert found == ["a", " ", "b", PART, "é", " ", PART, PART, "€", "\n"]
    assert pieces(Bytes(), list("aé".encode())[:2]) == ["a", PART]
