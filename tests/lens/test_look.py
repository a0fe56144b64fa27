"""The lens on real model classes: it agrees with eager maps, in O(N) memory, and leaves outputs unchanged."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartModel, DynamicCache

import foveate
from foveate.core import oracle
from foveate.core.errors import FoveateError
from foveate.host import Method, Site, Slots, apply, fused_statistics
from foveate.kv.sink_recent import SinkRecent
from foveate.lens import MEASURES, Entropy, Lens, SinkMass, html_table
from foveate.lens.lens import look
from tests.lens.models import eager_maps, image, text, tiny
from tests.support.tensors import assert_near

CASES = {
    "llama": ("llama", text()),
    "llama, padded left": ("llama", text("left")),
    "llama, padded right": ("llama", text("right")),
    "mistral, a window": ("mistral", text("left")),
    "gemma2, soft cap": ("gemma2", text("left")),
    "bert": ("bert", text()),
    "bert, padded": ("bert", text("right")),
    "vit": ("vit", image()),
}


def away(w: Tensor) -> Tensor:
    """How far each key lies before each query."""
    places = torch.arange(w.shape[-1])
    return places[:, None] - places


def later(w: Tensor) -> Tensor:
    """Whether each query is 10 to 100 tokens after each key."""
    return (away(w) >= 10) & (away(w) <= 100)


def names(kind: str) -> list[str]:
    """The measures that a model can have: those of tokens need their ids."""
    return [name for name, measure in MEASURES.items() if kind != "vit" or not measure.needs_ids]


def expected(maps: list[Tensor], inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Compute all measures from maps."""
    begins = inputs["attention_mask"].argmax(-1) if "attention_mask" in inputs else torch.zeros(2, dtype=torch.long)
    return {
        "entropy": [torch.special.entr(w).sum(-1) for w in maps],
        "sink_mass": [torch.stack([w[b, :, :, begins[b]] for b in range(2)]) for w in maps],
        "received_mass": [w.sum(-2) for w in maps],
        "received_mean": [w.sum(-2) / (w > 1e-12).sum(-2).clamp_min(1) for w in maps],
        "mean_distance": [(w * away(w).abs()).sum(-1) for w in maps],
        "own_token": [(w * (away(w) == 0)).sum(-1) for w in maps],
        "previous_token": [(w * (away(w) == 1)).sum(-1) for w in maps],
        "within_4": [(w * (away(w).abs() <= 4)).sum(-1) for w in maps],
        "windowed_distance": [(w * away(w).abs().clamp_max(10)).sum(-1) for w in maps],
        "future_influence": [
            (w * later(w)).sum(-2) / ((w.sum(-1) > 0)[..., None] & later(w)).sum(-2).clamp_min(1) for w in maps
        ],
    }


@pytest.mark.parametrize("case", CASES)
def test_measures_agree_with_eager_maps(case: str) -> None:
    kind, inputs = CASES[case]
    model = tiny(kind)
    maps = eager_maps(model, inputs)
    seen = look(model, inputs, measures=names(kind), keep_maps={(1, 2): [3, 0, -1], (0, 1): slice(5, 9)})
    for name, layers in expected(maps, inputs).items():
        for layer, values in enumerate(layers):
            assert_near(seen.values(name)[layer], values, 1e-4, f"{name}, layer {layer}")
    last = maps[1].shape[2] - 1
    assert_near(seen.map(1, 2), maps[1][:, 2, [0, 3, last]], 1e-4)
    assert_near(seen.map(0, 1), maps[0][:, 1, 5:9], 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_bit_identical(case: str) -> None:
    kind, inputs = CASES[case]
    model = tiny(kind)
    with torch.no_grad():
        before = model(**inputs)[0]
        with apply(model, Lens(phase="all")):
            during = model(**inputs)[0]
        after = model(**inputs)[0]
    assert torch.equal(before, during) and torch.equal(before, after)


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


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):  # an expanded view takes no memory
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("case", ["llama", "llama, padded left", "bert", "bert, padded"])
def test_memory_is_linear_on_the_fused_path(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, padding = CASES[case][0], "left" if "padded" in case else "none"
    n, largest, calls, read = 1024, LargestTensor(), [], Lens.read

    def watched(self: Lens, site: Site, out: Tensor) -> None:
        calls.append(site.layer)
        with largest:
            read(self, site, out)

    monkeypatch.setattr(Lens, "read", watched)
    model = tiny(kind) if kind == "llama" else tiny(kind, max_position_embeddings=n)
    some = [name for name in MEASURES if kind != "bert" or name != "mean_distance"]  # needs weights in both directions
    look(model, text(padding, n), measures=some)
    assert calls == [0, 1]
    assert largest.elements <= 2 * 4 * n * 16 < n * n  # batch · heads · length · a head's width, padded


def test_memory_is_linear_with_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    n, largest, read = 1024, LargestTensor(), Lens.read

    def watched(self: Lens, site: Site, out: Tensor) -> None:
        with largest:
            read(self, site, out)

    monkeypatch.setattr(Lens, "read", watched)
    monkeypatch.setattr("foveate.host.weight_tiles.TILE", 1 << 16)
    inputs = text("none", n)
    look(tiny("mistral"), {name: x[:1] for name, x in inputs.items()})
    assert largest.elements < n * n / 8


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_prompt_in_two_calls_is_one_sequence(kind: str) -> None:
    """A prompt in two calls gives the measures of one call, also with a sliding cache."""
    model, inputs = tiny(kind), text("left")
    whole = look(model, inputs, measures=list(MEASURES))
    lens, cache = Lens(list(MEASURES), keep_maps={(0, 0): [2, 20]}), DynamicCache(config=model.config)
    with torch.no_grad(), apply(model, lens):
        for start, stop in ((0, 10), (10, 24)):
            model(inputs["input_ids"][:, start:stop], attention_mask=inputs["attention_mask"][:, :stop],
                  past_key_values=cache)  # fmt: skip
    for name in MEASURES:
        for layer, values in whole.values(name).items():
            assert_near(lens.values(name)[layer], values, 1e-4, name)
    assert lens.map(0, 0).shape == (2, 2, 24)


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
    exact = expected(eager_maps(tiny("llama"), inputs), inputs)
    assert seen.values("entropy")[0].dtype == torch.float32
    for name in ("entropy", "sink_mass"):
        assert_near(seen.values(name)[0], exact[name][0], 0.05, name)


def test_look_is_public() -> None:
    assert foveate.look is look


def test_devices_without_a_kernel_use_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fused kernel that returns its log-sum-exp, tiles give the same measures."""
    model, inputs = tiny("llama"), text("left")
    quick = look(model, inputs, measures=list(MEASURES))
    monkeypatch.setattr(fused_statistics, "_has_kernel", lambda q: False)
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
    ],
)
def test_bad_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        look(tiny("llama"), text(), **wrong)
    assert message in str(caught.value)


def test_unmeasured_results_are_refused() -> None:
    seen = look(tiny("llama"), text())
    with pytest.raises(FoveateError, match="keep_maps"):
        seen.map(0, 0)
    with pytest.raises(FoveateError, match="received_mean"):
        seen.values("received_mean")
    with pytest.raises(FoveateError, match="phase='now'"):
        Lens(phase="now")


def test_a_model_with_two_stacks_is_refused() -> None:
    config = BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    with pytest.raises(FoveateError, match="a single stack"):
        look(BartModel(config).eval(), text())


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
