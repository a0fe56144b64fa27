"""Layers that hold older tokens encoded: with a codec that loses nothing, every model gives what it gives without."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, apply, coded_attention as attending, held
from foveate.host.slots import codes, encode
from foveate.host.slots.codec import Codec, Coding, Parts, Uncoded
from foveate.kv import H2O, KIVI, KNorm, RazorAttention, SinkRecent, SnapKV, TokenSelect
from tests.contracts.architectures import build
from tests.support.host_models import DECODERS, SameLogits, SameWeights, feed, model, padded, tokens

PAIR = 2


@dataclass(frozen=True)
class Shuffled(Codec):
    """Stores two tokens in a row, and their channels in the order of a table: exact, in a space of its own."""

    tables = ("order",)

    @property
    def tokens(self) -> int:
        return PAIR

    def encode(self, x: Tensor, tables: Parts) -> Parts:
        assert not x.isnan().any()
        order = tables["order"]
        mixed = x.gather(3, order[:, :, None].expand(*x.shape[:3], -1))
        return {"x": mixed.unflatten(2, (-1, PAIR)), "order": order}

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        return parts["x"].flatten(2, 3).to(dtype)

    def into(self, q: Tensor, parts: Parts) -> Tensor:
        return q.gather(3, parts["order"][:, :, None].expand(*q.shape[:3], -1))

    def restore(self, x: Tensor, parts: Parts, width: int) -> Tensor:
        back = parts["order"].argsort(-1)
        return x.gather(3, back[:, :, None].expand(*x.shape[:3], -1))


class Encodes(Method):
    """Encodes keys, of all but the newest two tokens, four at a time."""

    def __init__(self, group: int = 4, residual: int = 2) -> None:
        self.group, self.residual = group, residual

    def encode(self, site: Any) -> Coding:
        draw = torch.Generator().manual_seed(site.seen)  # a later table must not replace the first
        width, rows = site.new_k.shape[3], site.new_k.shape[:2]
        order = torch.rand(*rows, width, generator=draw).argsort(-1)
        return Coding(Shuffled(), Uncoded(), self.group, self.residual, {"order": order})


PIECES = {"whole": [14, 1, 1, 1, 1, 1, 1], "chunks": [5, 6, 3, 1, 1, 1, 1, 1, 1], "turns": [5, 1, 6, 1, 1, 6]}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (codes, encode, attending):
        monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(attending, "ROWS", 3)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.usefixtures("small_chunks")
@torch.no_grad()
def test_a_codec_that_loses_nothing_changes_nothing(name: str, side: str) -> None:
    """Windows, soft caps and padding included."""
    ids, mask = padded(tokens(2, 20), side, 4)
    for pieces in PIECES.values():
        expected = feed(model(name), ids, mask, pieces)
        cache = DynamicCache(config=model(name).config)
        with apply(model(name), Encodes()):
            got = feed(model(name), ids, mask, pieces, cache)
            assert all(layer.store.codes is not None for layer in cache.layers)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    """Encoded attention is computed in float32: it is as near to the model in float32 as the model itself."""
    whole = model("llama")
    half, (ids, mask) = copy.deepcopy(whole).to(dtype), padded(tokens(2, 20), "left", 4)
    exact = feed(whole, ids, mask, PIECES["whole"])
    plain = (feed(half, ids, mask, PIECES["whole"]).float() - exact).abs().max()
    with apply(half, Encodes()):
        got = feed(half, ids, mask, PIECES["whole"])
    assert got.dtype == dtype and (got.float() - exact).abs().max() < 1.5 * plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa", "inkling2_text", "falcon_h1"])
@pytest.mark.usefixtures("small_chunks")
@torch.no_grad()
def test_sinks_biases_and_states_beside_encoded_tokens(name: str) -> None:
    subject, (ids, mask) = build(name), padded(tokens(2, 20), "left", 4)
    for pieces in PIECES.values():
        expected = feed(subject, ids, mask, pieces, DynamicCache(config=subject.config))
        cache = DynamicCache(config=subject.config)
        with apply(subject, Encodes()):
            got = feed(subject, ids, mask, pieces, cache)
            assert any(getattr(layer, "store", None) and layer.store.codes is not None for layer in cache.layers)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_that_makes_its_keys_from_the_cache_is_refused() -> None:
    subject, (ids, mask) = build("deepseek_v3"), padded(tokens(2, 20), "left", 4)
    late = pytest.raises(UnsupportedModel, match="changes keys and values after the cache, so that its tokens cannot")
    with late, apply(subject, Encodes()):
        feed(subject, ids, mask, PIECES["whole"], DynamicCache(config=subject.config))
    early = pytest.raises(UnsupportedModel, match="computes the keys of layer 0 anew at each call")
    with early, apply(subject, KIVI()):
        pass


@torch.no_grad()
def test_every_token_is_encoded_once_and_nothing_decodes_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, seen = model("llama"), []
    original = Shuffled.encode

    def counted(self: Shuffled, x: Tensor, tables: Parts) -> Parts:
        seen.append(x.shape[2])
        return original(self, x, tables)

    monkeypatch.setattr(Shuffled, "encode", counted)
    monkeypatch.setattr(codes.Codes, "decoded", None)  # a dense copy would call it
    cache = DynamicCache()
    with apply(llama, Encodes()) as run:
        feed(llama, tokens(2, 30), torch.ones(2, 30, dtype=torch.long), [12, 3, *[1] * 15], cache)
        store = cache.layers[0].store
        assert sum(seen) == 3 * 28 and set(seen) == {4, 8} and store.codes.slots == 2 * 2 * 28
        assert store.groups[0].length == 2 and store.groups[0].slots.k.untyped_storage().nbytes() < 2 * 2 * 8 * 8 * 4
        size = (8 + 8) * 4
        assert store.needed_bytes == 4 * (28 * (size + 4) + 2 * size) + 4 * 8 * 8  # positions, and the table
        assert run.stats.cache_bytes == 3 * store.needed_bytes == held(cache).needed_bytes


EVICTING: dict[str, Callable[[], Method]] = {
    "ends": lambda: SinkRecent(2, 7),
    "once": lambda: SnapKV(share=0.6, recent=3),
    "heads": lambda: KNorm(share=0.6, heads="adaptive"),
    "steps": lambda: H2O(share=0.5),
    "often": lambda: KNorm(share=0.5, every=1),
}


@pytest.mark.parametrize("kind", EVICTING)
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_eviction_comes_first_and_reaches_encoded_tokens(kind: str, side: str) -> None:
    """Both together keep the tokens that the eviction keeps alone, and hold them encoded."""
    llama, (ids, mask) = model("llama"), padded(tokens(2, 24), side, 4)
    for pieces in ([16, *[1] * 8], [9, 7, *[1] * 8]):
        alone, both = DynamicCache(), DynamicCache()
        with apply(llama, EVICTING[kind]()):
            expected = feed(llama, ids, mask, pieces, alone)
            kept = positions(alone, mask)
        with apply(llama, EVICTING[kind](), Encodes()):
            got = feed(llama, ids, mask, pieces, both)
            assert positions(both, mask) == kept
            assert all(layer.store.codes.slots for layer in both.layers)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def positions(cache: DynamicCache, mask: Tensor) -> list[Any]:
    """The positions that each layer, sequence and head holds, without padding."""
    real = [set(row.nonzero().flatten().tolist()) for row in mask]
    return [
        [[sorted(real[row] & set(head)) for head in heads] for row, heads in enumerate(layer)]
        for layer in (one.store.padded("positions").tolist() for one in cache.layers)
    ]


@torch.no_grad()
def test_units_without_a_token_are_removed() -> None:
    """Tokens in one row of the codes leave together; until then a dropped one is an empty place."""
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, Encodes(4, 0)):
        llama(tokens(1, 16), past_key_values=cache)
    with apply(llama, _Keeps({0, 3, 4, 5, 10})):
        llama(tokens(1, 1), past_key_values=cache)
        store = cache.layers[0].store
        assert store.codes.slots == 2 * 8 and store.codes.has_empty
        assert positions(cache, torch.ones(1, 17, dtype=torch.long))[0] == [[[0, 3, 4, 5, 10, 16]] * 2]


class _Keeps(Method):
    def __init__(self, chosen: set[int]) -> None:
        self.chosen = chosen

    def keep(self, site: Any) -> Tensor:
        return torch.isin(site.positions, torch.tensor([*self.chosen, site.seen - 1]))


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_with_beams(beams: int) -> None:
    llama, (ids, mask) = model("llama"), padded(tokens(2, 14), "left", 4)
    options = {"max_new_tokens": 10, "num_beams": beams, "do_sample": False, "attention_mask": mask}
    expected = llama.generate(ids, **options)
    with apply(llama, Encodes()):
        assert torch.equal(llama.generate(ids, **options), expected)


@torch.no_grad()
def test_drafts_are_not_encoded_before_they_are_accepted() -> None:
    llama, ids = model("llama"), torch.cat([tokens(1, 8)] * 3, 1)
    expected = llama.generate(ids, max_new_tokens=16, do_sample=False)
    with apply(llama, Encodes()) as run:
        got = llama.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected) and run.stats.kept > 0


@pytest.mark.parametrize("end", [19, 14, 13, 10, 7, 2])
@torch.no_grad()
def test_a_cache_can_be_cropped_into_an_encoded_group(end: int) -> None:
    llama, ids, cache = model("llama"), tokens(2, 20), DynamicCache()
    more = tokens(2, 6, seed=3)
    with apply(llama, Encodes()):
        llama(ids, past_key_values=cache)
        cache.crop(end - 20)
        got = torch.cat(
            [llama(more[:, :4], past_key_values=cache).logits, llama(more[:, 4:5], past_key_values=cache).logits], 1
        )
    expected = llama(torch.cat([ids[:, :end], more[:, :5]], 1)).logits[:, end:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def copied(cache: DynamicCache, how: str) -> DynamicCache:
    if how == "deep copy":
        return copy.deepcopy(cache)
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deep copy", "pickle", "torch.save"])
@torch.no_grad()
def test_a_cache_outlives_its_block(how: str) -> None:
    """It can be copied and saved, works in later blocks, and is refused outside them in one line."""
    llama, ids, more, cache = model("llama"), tokens(2, 20), tokens(2, 3, seed=1), DynamicCache()
    with apply(llama, Encodes()):
        llama(ids, past_key_values=cache)
    before = held(cache)
    other = copied(cache, how)
    assert held(other) == before and before.kept < 1.2
    with pytest.raises(UnsupportedModel, match=r"holds tokens encoded; use it inside foveate.apply\(model\)"):
        llama(more, past_key_values=other)
    expected = llama(torch.cat([ids, more], 1)).logits[:, 20:]
    for methods in ([], [Encodes()]):
        with apply(llama, *methods):
            again = copied(other, how)
            torch.testing.assert_close(llama(more, past_key_values=again).logits, expected, atol=1e-4, rtol=1e-4)
    assert other.layers[0].keys.shape == (2, 2, 20, 8)  # decoded on demand


@torch.no_grad()
def test_copies_and_selections_in_the_batch() -> None:
    llama, ids, cache = model("llama"), tokens(2, 20), DynamicCache()
    more, chosen = tokens(4, 3, seed=1), torch.tensor([1, 0])
    with apply(llama, Encodes()):
        llama(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        got = llama(more, past_key_values=cache).logits
        cache.batch_select_indices(chosen)
        assert cache.layers[0].store.codes.positions(ids).shape[0] == 2
    whole = torch.cat([ids[[1, 1, 0, 0]], more], 1)
    torch.testing.assert_close(got, llama(whole).logits[:, 20:], atol=1e-4, rtol=1e-4)


class _Reads(Method):
    def __init__(self) -> None:
        self.found: list[tuple[Tensor, ...]] = []

    def read(self, site: Any, out: Tensor) -> None:
        order = site.positions.argsort(-1)[..., None].expand(site.k.shape)
        self.found.append((site.k.gather(2, order), site.v.gather(2, order)))


@torch.no_grad()
def test_readers_and_editors_get_decoded_tokens() -> None:
    """Keys, values and weights are those of a model that encodes nothing."""
    llama, ids, one = model("llama"), tokens(1, 20), tokens(1, 1, seed=1)
    results = []
    for methods in ([], [Encodes()]):
        cache, reads = DynamicCache(), _Reads()
        with apply(llama, reads, *methods):
            llama(ids, past_key_values=cache)
            reads.found.clear()
            llama(one, past_key_values=cache)
        results.append([x for pair in reads.found for x in pair])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for method in (SameWeights(), SameLogits()):
        found = []
        for methods in ([], [Encodes()]):
            with apply(llama, method, *methods):
                found.append(feed(llama, torch.cat([ids, one], 1), torch.ones(1, 21), [20, 1]))
        torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_a_context_encodes_its_text_and_keeps_questions_as_they_are() -> None:
    llama, text, question = model("llama"), tokens(1, 30), tokens(1, 4, seed=2)
    context = foveate.Context(llama, Encodes()).read(text)
    size, expected = context.nbytes, llama.generate(torch.cat([text, question], 1), max_new_tokens=8, do_sample=False)
    for _ in range(2):
        assert torch.equal(context.generate(question, 8), expected[:, 34:])
        assert context.nbytes == size and context.tokens == 30


def test_what_does_not_go_together_is_refused_in_one_line() -> None:
    llama = model("llama")
    with (
        pytest.raises(OptionError, match="Encodes and Encodes both encode layer 0"),
        torch.no_grad(),
        apply(llama, Encodes(), Encodes()),
    ):
        llama(tokens(1, 20), past_key_values=DynamicCache())
    with pytest.raises(OptionError, match="RazorAttention changes the tokens that it stores, and Encodes"):
        apply(llama, RazorAttention(torch.zeros(3, 2, dtype=torch.bool), min_window=4), Encodes())
    with pytest.raises(UnsupportedModel, match="encoded tokens have no gradient"), apply(llama, Encodes()):
        llama(tokens(1, 20), past_key_values=DynamicCache())
    with (
        pytest.raises(UnsupportedModel, match="layer 0 holds tokens encoded, and a policy that reads chosen keys"),
        torch.no_grad(),
        apply(llama, TokenSelect(2, 3, 4), Encodes()),
    ):
        feed(llama, tokens(1, 21), torch.ones(1, 21), [20, 1])
    with pytest.raises(OptionError, match="group=3 must be a multiple of the 2 tokens"):
        replace(Encodes().encode(_site()), group=3)
    assert llama(tokens(1, 4)).logits.isfinite().all()


def _site() -> Any:
    return type("Site", (), {"seen": 1, "new_k": torch.zeros(1, 1, 1, 4)})()
