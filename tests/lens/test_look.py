"""The lens beside other methods and over several texts, and what it shows. Its values are in the readers' contract."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core import oracle
from foveate.core.errors import FoveateError
from foveate.host import Method, Site, Slots, apply, fused_statistics
from foveate.kv.sink_recent import SinkRecent
from foveate.lens import MEASURES, Entropy, Lens, SinkMass, html_table
from foveate.lens.lens import look
from tests.contracts.readers import Whole, expected
from tests.lens.models import eager_maps, text, tiny
from tests.support.tensors import assert_near


def test_the_table_averages_over_counted_queries() -> None:
    model, inputs = tiny("llama"), text("left")
    maps, real = eager_maps(model, inputs), inputs["attention_mask"].bool()
    table = {(row["layer"], row["head"], row["measure"]): row["value"] for row in look(model, inputs).measures()}
    assert len(table) == 2 * 4 * 3
    for layer, w in enumerate(maps):
        entropy = torch.special.entr(w).sum(-1).sum(-1) / real.sum(-1)[:, None]
        share = w.sum(-2).amax(-1) / real.sum(-1)[:, None]
        for head in range(4):
            assert table[layer, head, "entropy"] == pytest.approx(entropy.mean(0)[head].item(), abs=1e-4)
            assert table[layer, head, "received_mass"] == pytest.approx(share.mean(0)[head].item(), abs=1e-4)


@pytest.mark.parametrize(("phase", "rows"), [("prefill", 24), ("decode", 4), ("all", 28)])
def test_the_phase_selects_calls_of_generation(phase: str, rows: int) -> None:
    model, lens = tiny("llama"), Lens(phase=phase)
    inputs = text()
    with torch.no_grad(), apply(model, lens):
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert lens.values("entropy")[0].shape == (2, 4, rows)
    maps = eager_maps(model, {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])})
    first = {"prefill": 0, "decode": 24, "all": 0}[phase]
    for layer, w in enumerate(maps):
        part = w[:, :, first : first + rows]
        assert_near(lens.values("entropy")[layer], torch.special.entr(part).sum(-1), 1e-4)
        received = part.sum(-2)[..., : first + rows]
        assert_near(lens.values("received_mass")[layer], received, 1e-4)


def test_the_table_averages_sequences_and_values_show_the_latest() -> None:
    model, lens, inputs = tiny("llama"), Lens(["entropy"]), text()
    singles = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(2)]
    with torch.no_grad(), apply(model, lens):
        for single in singles:
            model(**single)
    both = look(model, inputs, measures=["entropy"])
    assert_near(lens.values("entropy")[1], both.values("entropy")[1][1:], 1e-5)
    ours, theirs = ([row["value"] for row in rows] for rows in (lens.table(), both.measures()))
    assert ours == pytest.approx(theirs, abs=1e-5)
    lens.clear()
    assert lens.table() == [] and lens.values("entropy") == {}


def test_evicted_layers_are_measured_on_what_they_hold() -> None:
    """With sinks and a window kept, all mass is at the kept positions, and the sinks' share is right."""
    model, inputs = tiny("llama"), text()
    lens = Lens(["entropy", "sink_mass", "received_mass"], phase="decode", keep_maps={(0, 3): [-1]})
    with torch.no_grad(), apply(model, SinkRecent(sink=2, recent=5), lens):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    received, row = lens.values("received_mass")[0], lens.map(0, 3)
    held = torch.zeros(25, dtype=torch.bool)
    held[:2], held[-6:] = True, True  # the sinks, the window, and the new token, for which none is dropped yet
    assert received.shape == (2, 4, 25) and bool((received[..., ~held] == 0).all())
    assert_near(received.sum(-1), torch.ones(2, 4), 1e-5)
    assert_near(row[:, 0], received[:, 3], 1e-5)
    assert_near(lens.values("sink_mass")[0][..., 0], received[..., 0], 1e-5)


class UnevenEviction(Method):
    """A method whose head 0 keeps all keys and head 1 every other; `folds` merges dropped ones into a summary."""

    evicts = True

    def __init__(self, folds: bool) -> None:
        self.folds = folds

    def keep(self, site: Site) -> Tensor:
        return (site.positions % 2 == 0) | (torch.arange(2) == 0)[:, None] | (site.positions == site.seen - 1)

    def fold(self, site: Site, dropped: Slots, summary: Slots | None, heads: Tensor) -> Slots | None:
        if not self.folds:
            return None
        lost = (dropped.positions >= 0).sum(-1, keepdim=True)
        k, v = dropped.k.mean(2, keepdim=True), dropped.v.mean(2, keepdim=True)
        return Slots(k, v, torch.full_like(lost, -2), lost.float())

    def read(self, site: Site, out: Tensor) -> None:
        if site.layer == 0:
            self.weights = oracle.weights(site.q, site.k, mask=site.mask, scale=site.scale)
            self.positions = site.positions.repeat_interleave(2, 1)


@pytest.mark.parametrize("folds", [False, True])
def test_heads_with_different_keys_are_measured_separately(folds: bool) -> None:
    """Mass on a summary counts in the entropy, and at no position."""
    model, method, lens = tiny("llama"), UnevenEviction(folds), Lens(phase="decode", keep_maps={(0, 2): [-1]})
    with torch.no_grad(), apply(model, method, lens):
        model.generate(**text(), max_new_tokens=2, do_sample=False)
    w = method.weights
    assert_near(lens.values("entropy")[0], torch.special.entr(w).sum(-1), 1e-4)
    for head in range(4):
        for position in range(25):
            expected = (w[:, head, 0] * (method.positions[:, head] == position)).sum(-1)
            assert_near(lens.values("received_mass")[0][:, head, position], expected, 1e-4)
    assert_near(lens.map(0, 2)[:, 0], lens.values("received_mass")[0][:, 2], 1e-5)
    assert bool((lens.values("received_mass")[0][:, 2:].sum(-1) < 0.999).all()) == folds


class DropFirstKey(Method):
    """A method that sets the first key's weight to zero."""

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights[..., 0] = 0.0
        return weights


class ReplaceAttention(Method):
    def attend(self, site: Site) -> Tensor | None:
        return torch.zeros_like(site.q) if site.layer == 0 else None


@pytest.mark.parametrize("lens_first", [True, False])
def test_edited_weights_are_measured(lens_first: bool) -> None:
    model, lens = tiny("llama"), Lens(["sink_mass"])
    methods = (lens, DropFirstKey()) if lens_first else (DropFirstKey(), lens)
    with torch.no_grad(), apply(model, *methods):
        model(**text())
    assert all(bool((values == 0).all()) for values in lens.values("sink_mass").values())
    assert min(row["value"] for row in look(model, text(), measures=["sink_mass"]).measures()) > 0


def test_a_layer_with_replaced_attention_is_listed_as_unseen() -> None:
    model, lens = tiny("llama"), Lens()
    with torch.no_grad(), apply(model, ReplaceAttention(), lens):
        model(**text())
    assert lens.unseen.keys() == {0} and "replaced this layer's attention" in lens.unseen[0]
    assert lens.values("entropy").keys() == {1}


def test_layers_limits_the_measured_layers() -> None:
    model = tiny("llama")
    seen = look(model, text()["input_ids"], layers=[1], keep_maps={(0, 0): [-1]}, measures=[SinkMass(first=2)])
    assert seen.values(SinkMass(first=2)).keys() == {1} and seen.map(0, 0).shape == (2, 1, 24)
    assert {row["layer"] for row in seen.measures()} == {1}


def test_half_precision_is_measured_in_float32() -> None:
    model, inputs = tiny("llama").to(torch.bfloat16), text("left")
    seen = look(model, inputs)
    w, real = eager_maps(tiny("llama"), inputs)[0], inputs["attention_mask"].bool()
    assert seen.values("entropy")[0].dtype == torch.float32
    for measure in (Entropy(), SinkMass()):
        assert_near(seen.values(measure)[0], expected(measure, Whole(w, real)), 0.05, measure.name)


def test_look_is_public() -> None:
    assert foveate.look is look


def test_devices_without_a_kernel_use_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fused kernel that returns its log-sum-exp, tiles give the same measures."""
    model, inputs = tiny("llama"), text("left")
    quick = look(model, inputs, measures=list(MEASURES))
    monkeypatch.setattr(fused_statistics, "has_kernel", lambda q: False)
    slow = look(model, inputs, measures=list(MEASURES))
    for name in MEASURES:
        for layer, values in quick.values(name).items():
            assert_near(slow.values(name)[layer], values, 1e-4, name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(measures=["entorpy"]), 'unknown measure "entorpy"; did you mean "entropy"?'),
        (dict(measures=["entropy", "entropy"]), "different names"),
        (dict(layers=[2]), "layers: 2 must be in 0..1"),
        (dict(keep_maps={(0, 4): [0]}), "head 4 must be in 0..3"),
        (dict(keep_maps={(0, 1): 3}), "the queries of (0, 1) must be a slice or positions, such as [3]"),
    ],
)
def test_bad_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        look(tiny("llama"), text(), **wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("some text", "got a str"),
        ([1, 2, 3], "a tokenizer's mapping, such as tokenizer(text, return_tensors='pt'); got a list"),
        (torch.arange(5), "input_ids must be whole numbers (B, N), such as ids[None] of one text; got Tensor (5,)"),
        (torch.zeros(1, 5), "must be whole numbers (B, N), such as ids[None] of one text; got Tensor (1, 5) float32"),
        (torch.zeros(1, 0, dtype=torch.long), "got Tensor (1, 0)"),
        ({"input_ids": [[1, 2, 3]]}, "got [[1, 2, 3]]"),
    ],
)
def test_inputs_that_are_no_batch_of_tokens_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        look(tiny("llama"), inputs)
    assert message in str(caught.value)


def test_unmeasured_results_are_refused() -> None:
    seen = look(tiny("llama"), text())
    with pytest.raises(FoveateError, match="keep_maps"):
        seen.map(0, 0)
    with pytest.raises(FoveateError, match="received_mean"):
        seen.values("received_mean")
    with pytest.raises(FoveateError, match="phase='now'"):
        Lens(phase="now")


def test_a_notebook_shows_all_heads() -> None:
    """The HTML has a cell with each head's value, escapes names, and shows colours alone for many heads."""

    @dataclass(frozen=True)
    class Named(Entropy):
        name: str = field(default="<b>own</b>", init=False)

    seen = look(tiny("llama"), text(), measures=["sink_mass", Named()])
    shown = seen._repr_html_()
    cells = re.findall(r'title="layer (\d+), head (\d+): (\S+)" style="background:rgba\(\S+,(\S+)\)">(.*?)</td>', shown)
    rows = sorted(seen.measures(), key=lambda row: row["measure"] != "sink_mass")
    assert len(cells) == len(rows) == 16
    for (layer, head, value, _, written), row in zip(cells, rows, strict=True):
        assert (int(layer), int(head)) == (row["layer"], row["head"])
        assert float(value) == pytest.approx(row["value"], rel=1e-3) and written == f"{row['value']:.3g}"
    for start in (0, 8):
        values = torch.tensor([row["value"] for row in rows[start : start + 8]])
        shares = torch.tensor([float(cell[3]) for cell in cells[start : start + 8]]) / 0.7
        assert_near(shares, (values - values.min()) / (values.max() - values.min()), 0.01)
    assert "<b>" not in shown and "&lt;b&gt;own" in shown
    many = html_table.layer_head_tables(
        {"layer": 3, "head": head, "measure": "entropy", "value": math.nan if head == 2 else 1.0} for head in range(20)
    )
    assert many.count("<td title=") == 19 and many.count("<td></td>") == 1 and "head 19: 1" in many
    assert "nothing was measured" in html_table.layer_head_tables([])
