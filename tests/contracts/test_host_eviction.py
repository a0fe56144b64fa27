"""Evicting caches give the same result as a full cache that masks the dropped keys.

A different number of tokens stays in each layer, head and sequence. The oracle is a separate eager attention function
without any of the host's code: it has every key, and masks those that the rule has dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from foveate.core.selection import Indices, Selection
from foveate.host import Method, Site, apply
from foveate.host.hf.cache import SlotLayer
from foveate.host.slots.slots import SUMMARY, Slots
from tests.support.host_models import DECODERS, WINDOW, KeepsAll, SameWeights, feed, model, padded, tokens


def stays(positions: Tensor, seen: int, layer: int, by_sequence: bool) -> Tensor:
    """Return the mask `(B, H, S)` of the tokens that stay after `seen`: sinks, a window, and some older ones."""
    batch, heads = positions.shape[:2]
    sequence, head = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None]
    window = 3 + 2 * layer + 3 * head + 2 * by_sequence * sequence
    scattered = ((7 * positions + 3 * head + 5 * layer) % 4 == 0) & (positions >= seen - 12)
    return (positions < 1 + layer) | (positions >= seen - window) | scattered


class Drops(Method):
    def __init__(self, by_sequence: bool = False) -> None:
        self.by_sequence = by_sequence

    def keep(self, site: Site) -> Tensor:
        return stays(site.positions, site.seen, site.layer, self.by_sequence)


class SelectsHalf(Method):
    def select(self, site: Site) -> Selection:
        nq, nk = site.q.shape[2], site.k.shape[2]
        return Indices(torch.arange(nk // 2).expand(1, 1, nq, nk // 2), nq, nk)


class Hides(Method):
    """A method that hides the same keys of a full cache: those dropped before this call get no weight."""

    def __init__(self, by_sequence: bool) -> None:
        self.by_sequence = by_sequence

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        before = site.seen - site.q.shape[2]
        seen = stays(site.positions, before, site.layer, self.by_sequence) | (site.positions >= before)
        return logits.masked_fill(~seen.repeat_interleave(site.groups, 1)[:, :, None], float("-inf"))


def _oracle(by_sequence: bool) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **options: Any
    ) -> tuple[Tensor, None]:
        (b, hq, nq, _), (_, hkv, nk, _) = q.shape, k.shape
        positions = torch.arange(nk).expand(b, hkv, nk)
        seen = stays(positions, nk - nq, module.layer_idx, by_sequence) | (positions >= nk - nq)
        group = torch.arange(hq) // (hq // hkv)
        logits = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()[:, group]) * scaling
        if (cap := options.get("softcap")) is not None:
            logits = torch.tanh(logits / cap) * cap
        logits = logits + mask.double()
        logits = logits.masked_fill(~seen[:, group][:, :, None], torch.finfo(torch.float64).min)
        out = torch.einsum("bhij,bhjd->bihd", logits.softmax(-1), v.double()[:, group])
        return out.to(q.dtype), None

    return attend


for _name, _by_sequence in (("oracle", False), ("oracle by sequence", True)):
    AttentionInterface.register(_name, _oracle(_by_sequence))
    AttentionMaskInterface.register(_name, eager_mask)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield a model's name, and restore its implementation afterwards."""
    before = model(request.param).config._attn_implementation
    yield request.param
    model(request.param).set_attn_implementation(before)


PIECES = {"decoding": [12, *[1] * 12], "chunks": [7, 5, 1, 1, 8, 1, 1]}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_a_dropped_key_is_a_hidden_key(decoder: str, pieces: str, side: str) -> None:
    ids, mask = padded(tokens(3, 24), side, 3)
    whole = feed(model(decoder), ids, mask, PIECES[pieces])
    with apply(model(decoder), Drops(by_sequence=True)):
        got = feed(model(decoder), ids, mask, PIECES[pieces])
    with apply(model(decoder), Drops(by_sequence=True), SameWeights()):
        as_matrix = feed(model(decoder), ids, mask, PIECES[pieces])
    with apply(model(decoder), Hides(by_sequence=True)):
        hidden = feed(model(decoder), ids, mask, PIECES[pieces])
    model(decoder).set_attn_implementation("oracle by sequence")
    expected = feed(model(decoder), ids, mask, PIECES[pieces])
    assert (expected - whole).abs().max() > 0.1  # the dropped keys matter
    for ours in (got, as_matrix, hidden):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_from_an_evicting_cache(decoder: str, beams: int) -> None:
    ids, mask = padded(tokens(2, 14), "left")

    def generate() -> tuple[Tensor, Tensor]:
        made = model(decoder).generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=beams,
            past_key_values=DynamicCache(), return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits)

    _, whole = generate()
    with apply(model(decoder), Drops()):
        got = generate()
    model(decoder).set_attn_implementation("oracle")
    expected = generate()
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-4, rtol=1e-4)
    assert (got[1] - whole).abs().max() > 0.1


@pytest.mark.parametrize("how", ["alone", "left padding"])
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_batch(how: str) -> None:
    """A rule that counts from each sequence's own start gives a padded sequence the same as alone."""

    class FromItsStart(Method):
        def keep(self, site: Site) -> Tensor:
            own = site.positions - site.begins[:, None, None]
            return (own >= 0) & ((own < 2) | (own % 3 == site.layer) | (site.positions >= site.seen - 3))

    name, ids = "llama", tokens(2, 16)
    amount = 5 if how == "left padding" else 0
    batch, mask = padded(ids, "left", amount)
    pieces = [10, *[1] * 6]
    with apply(model(name), FromItsStart()):
        together = feed(model(name), batch, mask, pieces)[: 16 - amount]
        separate = feed(model(name), ids[:1, amount:], mask[:1, amount:], [10 - amount, *[1] * 6])
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
@torch.no_grad()
def test_a_mask_of_the_callers_own_is_read_at_the_slots(kind: str) -> None:
    llama, ids = model("llama"), tokens(2, 20)
    draw = torch.Generator().manual_seed(2)
    mask = torch.rand(2, 4 if kind == "per head" else 1, 4, 20, generator=draw) > 0.3
    mask = (mask | (torch.arange(20) >= 14)) & (torch.arange(20) <= torch.arange(16, 20)[:, None])
    given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if kind == "float" else mask

    def call() -> Tensor:
        cache = DynamicCache()
        llama(ids[:, :16], past_key_values=cache)
        return llama(ids[:, 16:], attention_mask=given, past_key_values=cache).logits

    with apply(llama, Drops(by_sequence=True)):
        got = call()
    with apply(llama, Hides(by_sequence=True)):
        expected = call()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_narrow_mask_of_the_callers_own_ends_with_the_last_key() -> None:
    """A sliding layer has fewer keys than the sequence has tokens, and its mask has as many as the layer."""
    mistral, ids = model("mistral"), tokens(2, 20)
    mask = torch.rand(2, 1, 2, WINDOW + 1, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., -2:] = torch.tensor([[True, False], [True, True]])

    def call() -> Tensor:
        cache = DynamicCache(config=mistral.config)
        mistral(ids[:, :18], past_key_values=cache)
        return mistral(ids[:, 18:], attention_mask=mask, past_key_values=cache).logits

    expected = call()
    with apply(mistral, KeepsAll()):
        torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-5)


# -- memory ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_memory_falls() -> None:
    """Each head stores exactly the slots that stay; a tensor has room for at most one token more."""
    llama, cache, batch, seen = model("llama"), DynamicCache(), 2, 40
    with apply(llama, Drops()) as run:
        llama(tokens(batch, seen - 1), past_key_values=cache)
        full = 3 * 2 * seen * batch * 2 * 8 * 4  # layers, heads, tokens, sequences, keys and values, width, float32
        llama(tokens(batch, 1, seed=1), past_key_values=cache)
        rule = [stays(torch.arange(seen).expand(batch, 2, seen), seen, layer, False) for layer in range(3)]
        survivors = sum(int(left.sum()) for left in rule)
        assert run.stats.kept == survivors / (3 * batch * 2 * seen) < 0.5
        assert run.stats.cache_bytes == survivors * 2 * 8 * 4
        assert run.stats.cache_bytes < run.stats.cache_peak < full
        assert run.stats.cache_bytes < 0.5 * full
        stores = [layer.store for layer in cache.layers]
        rows = 3 * 2 * batch
        nbytes = sum(store.nbytes for store in stores)
        assert run.stats.cache_bytes <= nbytes <= run.stats.cache_bytes + rows * 2 * 8 * 4
        kept = [tensor for store in stores for group in store.groups for tensor in (group.slots.k, group.slots.v)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == nbytes
        lengths = [group.stored // batch // group.heads.numel() for store in stores for group in store.groups]
        assert sorted(lengths) == sorted(int(left[0, head].sum()) for left in rule for head in range(2))
        assert len(set(lengths)) > 3
        assert [layer.get_seq_length() for layer in cache.layers] == [seen] * 3


@torch.no_grad()
def test_a_ragged_batch_costs_its_longest_sequence() -> None:
    """Sequences that keep unequal numbers share a tensor: the store counts its memory, with empty slots."""
    with apply(model("llama"), Drops(by_sequence=True)) as run:
        cache = DynamicCache()
        model("llama")(tokens(3, 40), past_key_values=cache)
        rule = [stays(torch.arange(40).expand(3, 2, 40), 40, layer, True) for layer in range(3)]
        assert run.stats.kept == sum(3 * int(left.sum(-1).amax(0).sum()) for left in rule) / (3 * 3 * 2 * 40)


@torch.no_grad()
def test_what_decoding_reads() -> None:
    with apply(model("llama"), Drops()) as run:
        model("llama").generate(tokens(2, 30), max_new_tokens=2, do_sample=False)
    left = sum(int(stays(torch.arange(30).expand(1, 2, 30), 30, layer, False).sum()) for layer in range(3))
    assert run.stats.calls == 3 * 2
    assert run.stats.read == pytest.approx((left + 3 * 2) / (3 * 2 * 31))  # the tokens that stayed, and the query's own
    with apply(model("llama"), SelectsHalf()) as run:
        model("llama").generate(tokens(2, 30), max_new_tokens=2, do_sample=False)
    assert run.stats.read == pytest.approx(15 / 31)
    assert run.stats.kept == 1.0
    with apply(model("llama")) as run:
        model("llama").generate(tokens(2, 30), max_new_tokens=10, do_sample=False)
    assert run.stats.read == run.stats.kept == 1.0


def test_a_sliding_layer_keeps_its_window_only() -> None:
    with torch.no_grad(), apply(model("mistral"), Drops()):
        cache = DynamicCache(config=model("mistral").config)
        model("mistral")(tokens(1, 30), past_key_values=cache)
        assert all(isinstance(layer, SlotLayer) for layer in cache.layers)
        positions = torch.cat([layer.store.padded("positions").flatten() for layer in cache.layers])
        assert int(positions[positions >= 0].min()) == 30 - WINDOW + 1


# -- summaries ---------------------------------------------------------------------------------------------------------


class Folds(Method):
    """A method that drops all but a window, and folds dropped tokens into their mean."""

    def keep(self, site: Site) -> Tensor:
        return site.positions >= site.seen - 4

    def fold(self, site: Site, dropped: Slots, summary: Slots | None, heads: Tensor) -> Slots:
        count = torch.full(dropped.positions.shape[:2], float(dropped.positions.shape[2]))[..., None]
        k, v = dropped.k.sum(2, keepdim=True), dropped.v.sum(2, keepdim=True)
        if summary is not None:
            k, v = k + summary.k * summary.weight[..., None], v + summary.v * summary.weight[..., None]
            count = count + summary.weight
        at = torch.full(count.shape, SUMMARY)
        return Slots(k / count[..., None], v / count[..., None], at, count)


@pytest.mark.parametrize("through", ["the kernel", "the matrix", "a mask of the caller's own"])
@torch.no_grad()
def test_a_summary_of_equal_tokens_is_exact(through: str) -> None:
    """Equal tokens without positions have equal keys and values: their mean and count replace them exactly."""
    llama = model("llama")
    ids = torch.full((2, 20), 7)
    where = dict(position_ids=torch.zeros(2, 20, dtype=torch.long))

    def call() -> Tensor:
        cache = DynamicCache()
        llama(ids, **where, past_key_values=cache)
        step = dict(position_ids=torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
        if through == "a mask of the caller's own":
            step["attention_mask"] = torch.ones(2, 1, 1, 21, dtype=torch.bool)
        return llama(torch.full((2, 1), 9), **step).logits

    extra = [SameWeights()] if through == "the matrix" else []
    expected = call()
    with apply(llama, Folds(), *extra) as run:
        got = call()
        assert run.stats.kept == 5 * (64 + 4) / (21 * 64)  # a weight takes 4 bytes beside 64
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
