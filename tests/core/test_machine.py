"""The rates of a machine: predicted times, the engine that `auto` picks by them, and files that cannot be used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.core import engines
from foveate.core.call import AttentionCall
from foveate.core.engines import ENGINES, flex, fused, gather, machine, slices
from foveate.core.engines.work import LOOP, RULE, Work
from foveate.core.errors import OptionError
from foveate.core.selection import Blocks, Indices
from foveate.core.window_selection import window
from tests.support.tensors import qkv


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a cache folder whose file counts."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    machine.forget()
    yield tmp_path
    machine.forget()


def tiles(n: int = 512, heads: int = 4, keep: float = 0.25, **rest: object) -> AttentionCall:
    random = torch.Generator().manual_seed(2)
    chosen = torch.rand(1, heads, n // 64, n // 64, generator=random) < keep
    q, k, v = qkv(n, batch=1, heads=4, kv_heads=4, width=8, dtype=torch.float32, **rest)
    return AttentionCall(
        q, k, v, 1.0, None, True, Blocks(chosen | torch.eye(n // 64, dtype=torch.bool), (64, 64), n, n)
    )


def rated(**products: float) -> machine.Machine:
    """Make a machine whose engines pay for products alone."""
    rates = {f"{name} float32 {way}": Work(products=cost) for name, cost in products.items()
             for way in ("forward", "backward")}  # fmt: skip
    return machine.Machine(rates)


# -- work --------------------------------------------------------------------------------------------------------------


def test_work_is_counted_by_hand() -> None:
    """Two heads of two rows of tiles: head 0 sees tiles 0 and 0-1, head 1 its own tile; 5 + 3 channels."""
    chosen = torch.tensor([[[1, 0], [1, 1]], [[1, 0], [0, 1]]], dtype=torch.bool)[None]
    q, k, v = torch.zeros(1, 2, 256, 5), torch.zeros(1, 1, 256, 5), torch.zeros(1, 1, 256, 3)
    call = AttentionCall(q, k, v, 1.0, None, False, Blocks(chosen, (128, 128), 256, 256))
    held = 128 * 128 + 128 * 256  # all heads read what any of them sees
    # the mask of each run, and twice more since the selection is new
    assert slices.work(call) == Work(calls=2, products=2 * held * 8, copied=0, masked=3 * 2 * held, planned=2)
    wide = replace(call, selected=replace(call.selected, blocks=chosen[:, :1]))
    assert slices.work(wide).masked == 0
    # one slab of two rows, as wide as the wider one
    slab = Work(calls=1, products=128 * 2 * 512 * 8, planned=4)
    learns = replace(call, q=q.clone().requires_grad_())
    assert gather.work(learns) == slab._replace(indexed=2 * 512 * 8, masked=2 * 512 * 128)
    # without gradients each row of each head copies and multiplies its own five tiles
    assert gather.work(call) == Work(products=5 * 128 * 128 * 8, copied=5 * 128 * 8, planned=LOOP * 4)
    assert gather.work(wide) == slab._replace(copied=2 * 512 * 8, masked=512 * 128)
    assert flex.work(call) == Work(calls=1, products=5 * 128 * 128 * 8, masked=8)
    dense = replace(call, selected=None)
    assert fused.work(dense) == Work(calls=1, products=2 * 256 * 256 * 8)
    assert fused.work(replace(dense, causal=True)).products == 2 * (256 * 257 // 2) * 8


def test_ranges_that_lie_apart_are_copied() -> None:
    chosen = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    x = torch.zeros(1, 2, 512, 4)
    call = AttentionCall(x, x, x, 1.0, None, False, Blocks(chosen[None, None], (128, 128), 512, 512))
    assert slices.work(call).copied == 2 * 256 * 8  # two heads, two tiles of 128, keys and values of four channels
    same = 128 * 128  # the first two runs see their own tile, and share its mask
    assert slices.work(replace(call, causal=True)).masked == 3 * slices.pairs(call.selected, True) - same


def test_a_selection_that_comes_again_shares_masks_and_is_cut() -> None:
    """Of a window the first two runs see less, and all others make one mask together."""
    x, device = torch.zeros(1, 2, 1024, 4), torch.device("cpu")
    banded = window(1024, 1024, 100, 0, device)
    assert banded.comes_again
    assert banded is window(1024, 1024, 100, 0, device)
    call = AttentionCall(x, x, x, 1.0, None, True, banded)
    first, other = 128 * 128, 128 * (128 + 99)
    pairs = first + 7 * other
    assert slices.work(call) == Work(calls=2, products=2 * pairs * 8, masked=RULE * (first + other))
    fresh = replace(banded)
    assert not fresh.comes_again
    assert slices.work(replace(call, selected=fresh)).masked > 3 * pairs
    assert slices.work(replace(call, selected=fresh)).planned == 8


def test_lists_of_keys_are_counted() -> None:
    index = torch.zeros(1, 2, 4, 3, dtype=torch.long)
    x = torch.zeros(1, 2, 8, 4)
    call = AttentionCall(x, x, x, 1.0, None, False, Indices(index, 8, 8, group=2))
    assert gather.work(call) == Work(1, products=2 * 2 * 12 * 8, indexed=2 * 12 * 8, masked=2 * 12 * 2, planned=8)


# -- predictions -------------------------------------------------------------------------------------------------------


def test_seconds_are_amounts_by_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "current", lambda: rated(gather=2e-9, fused=1e-9))
    call = tiles()
    assert engines.seconds(call, "gather") == pytest.approx(2e-9 * gather.work(call).products)
    plan = engines.plan(replace(call, selected=None))
    assert plan.seconds == pytest.approx(1e-9 * fused.work(replace(call, selected=None)).products)
    assert "about" in str(plan)
    assert Work(1, 2, 3, 4, 5, 6).seconds(Work(1, 10, 100, 1000, 10000, 100000)) == 654321


def test_nothing_predicts_other_engines_devices_and_shapes_alone() -> None:
    call = tiles()
    assert engines.seconds(call, "reference") is engines.seconds(call, "chunked") is None
    assert (
        engines.seconds(replace(call, q=call.q[:, :0], k=call.k[:, :0], v=call.v[:, :0], selected=None), "fused")
        is None
    )
    x = call.q.to("meta")
    assert engines.plan(AttentionCall(x, x, x, 1.0)).seconds is None


@pytest.mark.parametrize(("cheap", "dear"), [("slices", "gather"), ("gather", "slices")])
def test_auto_picks_the_least_predicted_time(cheap: str, dear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pick changes, the output does not."""
    call = tiles()
    expected = engines.run(call, "reference")
    monkeypatch.setattr(machine, "current", lambda: rated(**{cheap: 1e-15, dear: 1.0}))
    name, why = engines.choose(call)
    assert name == cheap
    assert "ms predicted" in why and dear in why
    torch.testing.assert_close(engines.run(call), expected)


def test_calls_that_want_gradients_have_rates_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"slices float32 forward": Work(calls=1.0), "gather float32 forward": Work(calls=1e-9),
             "slices float32 backward": Work(calls=1e-9), "gather float32 backward": Work(calls=1.0)}  # fmt: skip
    monkeypatch.setattr(machine, "current", lambda: machine.Machine(rates))
    assert engines.choose(tiles())[0] == "gather"
    assert engines.choose(tiles(grad=True))[0] == "slices"


def test_a_dtype_without_rates_takes_those_of_float32() -> None:
    found = machine.Machine({"gather float32 forward": Work(1.0), "gather bfloat16 forward": Work(2.0)})
    assert found.rate("gather", torch.bfloat16, False) == Work(2.0)
    assert found.rate("gather", torch.float16, False) == Work(1.0)
    assert found.rate("gather", torch.float32, True) is None


def test_shipped_rates_have_every_engine_that_auto_chooses_among() -> None:
    rates = machine.shipped(1).rates
    for name in ("fused", "slices", "gather"):
        assert {f"{name} float32 forward", f"{name} float32 backward"} <= rates.keys()
    assert "flex float32 forward" in rates
    assert {name.split()[0] for name in rates} <= {name for name in ENGINES if hasattr(ENGINES[name], "work")}
    four = machine.shipped(4).rates["slices float32 forward"]
    one = rates["slices float32 forward"]
    assert one.calls > 0
    assert (four.calls, four.products) == (one.calls, one.products / 4)


# -- files -------------------------------------------------------------------------------------------------------------


def saved(path: Path, **changes: object) -> None:
    made = machine.Machine({"gather float32 forward": Work(1.0, 2.0)}, torch.get_num_threads())
    path.write_text(json.dumps({**json.loads(machine.to_json(made)), **changes}))


def test_a_file_counts_until_it_is_forgotten(folder: Path) -> None:
    threads = torch.get_num_threads()
    assert machine.current().source is None
    saved(machine.file(threads))
    assert machine.current().source is None
    machine.forget()
    found = machine.current()
    assert found.source == machine.file(threads)
    assert found.source.parent == folder and found.source.name.startswith("machine-")
    assert found.rates["gather float32 forward"] == Work(1.0, 2.0)
    assert found.rates["slices float32 forward"] == machine.shipped(threads).rates["slices float32 forward"]
    assert machine.file(threads + 1) != machine.file(threads)


def test_the_file_can_be_left_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.file(torch.get_num_threads()).write_text("damaged")
    monkeypatch.setenv(machine.VARIABLE, "shipped")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.current().source is None


BROKEN = {
    "": r"is damaged \(",
    "[]": 'is not of the format "foveate.machine/1"',
    '{"format": "foveate.machine/0"}': 'is not of the format "foveate.machine/1"',
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_damaged_file_is_one_line_and_is_ignored(folder: Path, content: str) -> None:
    machine.file(torch.get_num_threads()).write_text(content)
    with pytest.warns(UserWarning, match=BROKEN[content]) as caught:
        picks = [engines.choose(tiles()) for _ in range(2)]
    assert picks[0] == picks[1]
    assert len(caught) == 1, "it is said once"
    line = str(caught[0].message)
    assert "\n" not in line
    assert "the shipped rates choose engines until `foveate bench calibrate`" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, "was measured with torch 1.0, and this is"),
        ({"threads": 99}, "has no rates for"),
        ({"rates": {}}, "has no rates for"),
        ({"rates": {"gather float32 forward": {"calls": 1}}}, "are not seconds"),
        ({"rates": {"gather float32 forward": Work()._asdict()}}, "are not seconds"),
        ({"rates": {"gather float32 forward": Work(-1.0)._asdict()}}, "are not seconds"),
        ({"rates": {"gather float32 forward": Work(float("inf"))._asdict()}}, "are not seconds"),
        ({"rates": {"gather float32 forward": {**Work(1.0)._asdict(), "calls": True}}}, "are not seconds"),
        ({"rates": {"gather float32 forward": 3}}, "are not seconds"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folder: Path, changes: dict, message: str) -> None:
    path = folder / "machine.json"
    saved(path)
    assert machine.load(path, torch.get_num_threads()).source == path
    saved(path, **changes)
    with pytest.raises(OptionError, match=message):
        machine.load(path, torch.get_num_threads())


def test_a_file_that_is_a_folder_is_ignored(folder: Path) -> None:
    machine.file(torch.get_num_threads()).mkdir()
    assert machine.current().source is None
