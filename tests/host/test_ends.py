"""`Ends` and its ledger keep the same tokens as a mask. In the steady state they need neither a mask nor the device."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf
from torch import Tensor

from foveate.host import Ends, Method, Packed, apply
from foveate.host.hf.cache import SlotLayer
from foveate.host.slots.ends import Ledger
from foveate.host.slots.slots import Slots
from foveate.host.slots.store import Store
from foveate.kv.razor_attention import RazorAttention, compensation
from foveate.kv.sink_recent import SinkRecent
from tests.support.host_models import model as model_of, tokens as drawn


def prompt(rows: int, n: int, seed: int = 0) -> Tensor:
    return drawn(rows, n, seed)


def mask(store: Store, ends: Ends, seen: int) -> Tensor:
    positions = store.padded("positions")
    kept = (positions >= 0) & ((positions < ends.sink) | (positions >= seen - ends.recent))
    kept[:, sorted(ends.full)] = True
    return kept


def folded(dropped: Slots, summary: Slots | None, heads: Tensor) -> Slots:
    return compensation(dropped, summary)


def held(store: Store) -> list[dict[int, tuple[float, float]]]:
    """Map, for each head of each sequence, positions to the stored numbers."""
    k, v, positions = (store.padded(what) for what in ("k", "v", "positions"))
    rows = zip(positions.flatten(0, 1).tolist(), k[..., 0].flatten(0, 1), v[..., 0].flatten(0, 1), strict=True)
    return [
        {p: (round(float(a), 4), round(float(b), 4)) for p, a, b in zip(row, ks, vs, strict=True) if p != -1}
        for row, ks, vs in rows
    ]


def tokens(n: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, n, 4, generator=draw), torch.randn(2, 3, n, 2, generator=draw)


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_ends_keep_what_a_mask_keeps(seed: int, folds: bool) -> None:
    """Appending, dropping, cropping and selecting in the batch may come in any order."""
    draw, (k, v) = random.Random(seed), tokens(0, seed)
    stores, fold = [Store.empty(k, v) for _ in range(2)], (folded if folds else None)
    full = frozenset(draw.sample(range(3), draw.choice([0, 1, 2])))
    ends, seen, slid = Ends(draw.choice([0, 2, 5]), draw.choice([3, 40]), full), 0, 0
    for step in range(60):
        n = 70 if step == 0 else draw.choice([1, 1, 1, 1, 2, 5])
        k, v = tokens(n, 1000 * seed + step)
        for store in stores:
            store.append(k, v, seen)
        seen += n
        done = stores[0].slide(ends, seen, fold)
        slid += done is not None
        if done is None:
            stores[0].evict(mask(stores[0], ends, seen), fold)
        stores[1].evict(mask(stores[1], ends, seen), fold)
        if draw.random() < 0.1:
            index = torch.tensor(draw.choices(range(2), k=2))
            stores = [store.batch(index) for store in stores]
        if draw.random() < 0.1:
            seen -= 1
            for store in stores:
                store.drop_after(seen)
        assert held(stores[0]) == held(stores[1])
        assert stores[0].stored == stores[1].stored
        torch.testing.assert_close(*(store.padded("bias").sum((1, 2)) for store in stores))
    assert slid > 30


@pytest.mark.parametrize("gaps", [0, 1, 2], ids=["all stay", "gaps", "rows differ"])
def test_tokens_that_are_placed_end_the_ledger(gaps: int) -> None:
    """A call whose tokens were dropped between blocks fills slots that the ledger does not know."""
    store, ends, seen, slid = Store.empty(*tokens(0, 0)), Ends(2, 200), 0, []
    expected: list[dict[int, tuple[float, float]]] = [{} for _ in range(6)]
    for step, n in enumerate([300, *[1] * 6, 2, *[1] * 230]):
        k, v = tokens(n, step)
        positions = torch.arange(seen, seen + n, dtype=torch.int32).repeat(2, 1)
        if n == 2:
            assert all(slid[1:]), "the ledger is in use"
            positions[0, :gaps] = -1
            positions[1, : min(gaps, 1)] = -1
            store.place(k, v, positions, (min(gaps, 1), gaps))
        else:
            store.append(k, v, seen)
        seen += n
        for row, (ks, vs) in enumerate(zip(k[..., 0].flatten(0, 1), v[..., 0].flatten(0, 1), strict=True)):
            new = zip(positions[row // 3].tolist(), ks.tolist(), vs.tolist(), strict=True)
            whole = expected[row] | {p: (round(a, 4), round(b, 4)) for p, a, b in new if p >= 0}
            expected[row] = {p: both for p, both in whole.items() if p < 2 or p >= seen - 200}
        slid.append(done := store.slide(ends, seen))
        if done is None:
            store.evict(mask(store, ends, seen))
        assert held(store) == expected
        assert store.stored == 6 * max(map(len, expected))
    assert slid[-1] is not None or gaps


def test_empty_slots_among_placed_tokens_are_counted_and_taken() -> None:
    store, (k, v) = Store.empty(*tokens(0, 0)), tokens(4, 1)
    store.append(*tokens(10, 0), 0)
    store.place(k, v, torch.tensor([[-1, 11, -1, 13], [10, -1, 12, 13]], dtype=torch.int32), (1, 2))
    assert store.stored == 6 * 13 and store.has_empty
    store.append(*tokens(1, 2), 14)
    assert [sorted(row) for row in held(store)] == [[*range(10), 11, 13, 14]] * 3 + [[*range(10), 10, 12, 13, 14]] * 3
    assert store.stored == 6 * 14


def test_the_mask_has_both_ends_and_no_empty_slot() -> None:
    positions = torch.tensor([[[0, 1, 2, -1, 6, 7, 8], [0, 1, 2, -1, 6, 7, 8]]])
    kept = [True, True, False, False, False, True, True]
    assert Ends(2, 2).mask(positions, 9).tolist() == [[kept, kept]]
    assert Ends(2, 2, frozenset({1})).mask(positions, 9).tolist() == [[kept, [True] * 7]]
    assert Ends(0, 1).mask(positions[:, :1], 9).tolist() == [[[False] * 6 + [True]]]


def test_rows_with_different_tokens_have_no_ledger() -> None:
    alike = torch.tensor([[[0, 5, -1, 6], [0, 5, -1, 6]]])
    ledger = Ledger.read(alike, 1)
    assert ledger is not None and (list(ledger.slots), ledger.free, ledger.oldest) == ([1, 3], [2], 5)
    assert Ledger.read(torch.tensor([[[0, 5, -1, 6], [0, 6, -1, 5]]]), 1) is None
    assert Ledger.read(torch.tensor([[[0, 5, -1, 8]]]), 1) is None, "a run with a gap"


RAZOR = RazorAttention(torch.tensor([[True, False]] * 3), min_window=20)
SINK = SinkRecent(2, 20)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "method"), [("llama", SINK), ("mistral", SINK), ("gemma3", SINK), ("llama", RAZOR)])
def test_the_steady_state_makes_no_mask(kind: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full heads in a layer with a window need a mask, and are left out here."""
    model = model_of(kind)
    cache = hf.DynamicCache(config=model.config)
    with apply(model, method):
        model(prompt(1, 40), past_key_values=cache)
        for step in range(3):
            model(prompt(1, 1, step), past_key_values=cache)

        def never(*_: object) -> None:
            raise AssertionError("a mask was made")

        monkeypatch.setattr(Store, "evict", never)
        monkeypatch.setattr(Ledger, "read", never)
        for step in range(20):
            model(prompt(1, 1, step), past_key_values=cache)
    assert any(isinstance(layer, SlotLayer) or layer.get_seq_length() == 63 for layer in cache.layers)


@torch.no_grad()
def test_packed_writes_in_place_and_returns_ordinary_layers() -> None:
    model, cache = model_of("llama"), hf.DynamicCache()
    with apply(model, Packed()):
        model(prompt(1, 64), past_key_values=cache)
        places = set()
        for step in range(6):
            model(prompt(1, 1, step), past_key_values=cache)
            places.add(cache.layers[0].store.groups[0].slots.k.data_ptr())  # type: ignore[union-attr]
        assert len(places) <= 4, "room for two tokens in 64"
    assert all(type(layer) is hf.cache_utils.DynamicLayer for layer in cache.layers)
    assert cache.layers[0].keys.shape[2] == 70 == cache.get_seq_length()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_packed_does_not_change_layers_with_a_window(kind: str) -> None:
    model = model_of(kind)
    cache = hf.DynamicCache(config=model.config)
    with apply(model, Packed()):
        model(prompt(1, 20), past_key_values=cache)
        for layer, plain in zip(cache.layers, hf.DynamicCache(config=model.config).layers, strict=True):
            assert isinstance(layer, SlotLayer) == (not plain.is_sliding)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_a_layer_that_holds_everything_attends_natively(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes a layer whose window is not full yet: its results are the model's own, bit for bit."""
    monkeypatch.delattr("foveate.host.attention.stored")
    model, logits = model_of(kind), []
    for methods in ((), (SinkRecent(2, 100),)):
        cache = hf.DynamicCache(config=model.config)
        with apply(model, *methods):
            model(prompt(1, 3), past_key_values=cache)
            logits.append([model(prompt(1, 1, step), past_key_values=cache).logits for step in range(3)])
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("recent", [3, 100])
def test_a_window_keeps_the_tokens_that_the_next_one_sees(recent: int) -> None:
    """They are one less than the window, as in the model's own cache, or fewer if the policy keeps fewer."""
    model = model_of("mistral")
    cache = hf.DynamicCache(config=model.config)
    window = cache.layers[0].sliding_window
    with apply(model, SinkRecent(0, recent)):
        for piece in prompt(1, 30).split([12, *[1] * 18], 1):
            model(piece, past_key_values=cache)
        stored = {layer.store.stored for layer in cache.layers}  # type: ignore[union-attr]
    assert stored == {2 * min(recent, window - 1)}


def test_slots_in_the_middle_are_views() -> None:
    """The buffer's front is the summary; the slots behind it are not copied to be read."""
    k, v = tokens(50, 0)
    store = Store.empty(k, v)
    store.append(k, v, 0)
    store.evict(mask(store, Ends(2, 20), 50), folded)
    (group,) = store.groups
    assert group.all().k.data_ptr() == group._buffer.k.data_ptr()
    assert group.summary is not None and group.bias is not None
    torch.testing.assert_close(group.bias[..., 0].exp(), torch.full((2, 3), 28.0))
    assert isinstance(group.slots, Slots) and group.bias[..., 1:].abs().max() == 0
