"""The end of a pass: what methods get, what they drop, and a second reading that leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.host import AT_END, Method, PassEnd, Site, apply
from tests.contracts.policies import Batch, subject
from tests.support.host_models import DECODERS, Reads, feed, model, padded, tokens

N = 20


class AtEnd(Method):
    """A method that keeps, at the end of a pass, what `choose` says of each call."""

    def __init__(self, choose: Any, more: int = 0) -> None:
        self.choose, self.more, self.ends, self.reader = choose, more, [], Reads(lambda site: site.k.shape[2])

    def keep(self, site: Site) -> Any:
        return AT_END

    def keep_all(self, end: PassEnd) -> list[Tensor | None]:
        self.ends.append(end)
        if self.more and end.ids is not None:
            ids = end.ids[:, :1].expand(-1, self.more)
            end.reread(ids, torch.ones_like(ids, dtype=torch.bool), self.reader)
        return [self.choose(site) for site in end.sites]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_a_second_reading_leaves_no_trace(name: str, side: str) -> None:
    """A prompt in two pieces and single tokens: all results are those of a method that only stores in slots."""
    ids, mask = padded(tokens(2, N), side)
    sizes, method = [9, 8, 1, 1, 1], AtEnd(lambda site: None, more=5)
    with apply(model(name), AtEnd(lambda site: None)):
        expected = feed(model(name), ids, mask, sizes)
    with apply(model(name), method) as run:
        assert torch.equal(feed(model(name), ids, mask, sizes), expected)
        calls = run.stats.calls
    assert method.reader.seen and calls == len(sizes) * len(method.ends[0].sites)


@torch.no_grad()
def test_a_second_reading_restores_the_state_of_convolutions() -> None:
    batch, method = Batch.of([N, N], "none", 3), AtEnd(lambda site: None, more=4)
    with apply(subject("hybrid"), AtEnd(lambda site: None)):
        expected = batch.feed(subject("hybrid"), [9, 11, 1, 1, 1])
    with apply(subject("hybrid"), method):
        got = batch.feed(subject("hybrid"), [9, 11, 1, 1, 1])
    assert method.reader.seen and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_reader_sees_the_cache_and_the_new_tokens() -> None:
    """The weights of a second reading are those of one longer text."""
    llama, ids, seen = model("llama"), tokens(1, N), []
    method = AtEnd(lambda site: None, more=3)
    method.reader = Reads(lambda site: seen.append((site.q.clone(), site.k.clone(), site.seen)))
    with apply(llama, method):
        llama(ids, past_key_values=DynamicCache())
    whole = Reads(lambda site: (site.q, site.k))
    with apply(llama, whole):
        llama(torch.cat([ids, ids[:, :1].expand(-1, 3)], 1))
    for (q, k, length), (q_whole, k_whole) in zip(seen, whole.seen, strict=True):
        torch.testing.assert_close((q, k), (q_whole[:, :, N:], k_whole), atol=1e-5, rtol=1e-5)
        assert length == N + 3


@torch.no_grad()
def test_layers_drop_together_what_the_method_chooses() -> None:
    llama, cache = model("llama"), DynamicCache()
    method = AtEnd(lambda site: (site.positions + site.layer) % 3 != 0)
    with apply(llama, method) as run:
        llama(tokens(1, N), past_key_values=cache)
        for number, layer in enumerate(cache.layers):
            held = layer.store.padded("positions")[0, 0].tolist()
            assert held == [place for place in range(N) if (place + number) % 3 != 0]
        assert run.stats.kept == sum(len(layer.store.padded("positions")[0, 0]) for layer in cache.layers) / (3 * N)
    (end,) = method.ends
    assert [site.layer for site in end.sites] == [0, 1, 2] and end.ids is not None and end.ids.shape == (1, N)
    assert bool(end.sites[0].q.isnan().all()) and end.sites[0].seen == N


@torch.no_grad()
def test_slots_that_moved_since_the_call_are_found_by_their_positions() -> None:
    """Another method drops at the call; the choice at the end of the pass still names the right tokens."""

    class First(Method):
        def keep(self, site: Site) -> Tensor:
            return site.positions >= 4

    llama, cache = model("llama"), DynamicCache()
    with apply(llama, First(), AtEnd(lambda site: site.positions % 2 == 0)):
        llama(tokens(1, N), past_key_values=cache)
        assert cache.layers[0].store.padded("positions")[0, 0].tolist() == list(range(4, N, 2))


@torch.no_grad()
def test_embeddings_have_no_tokens_and_an_exception_ends_a_pass() -> None:
    llama, method = model("llama"), AtEnd(lambda site: None)
    embedded = llama.get_input_embeddings()(tokens(1, N))
    with apply(llama, method):
        llama(inputs_embeds=embedded, past_key_values=DynamicCache())
        assert method.ends[-1].ids is None
        llama(inputs_embeds=embedded[:, :3], past_key_values=DynamicCache())
        with pytest.raises(TypeError):
            llama(tokens(1, N), past_key_values=DynamicCache(), nonsense=object(), position_ids="x")
        llama.model(tokens(1, N), past_key_values=DynamicCache())  # the base alone is a pass too
        assert method.ends[-1].ids is not None and method.ends[-1].ids.shape == (1, N)


@torch.no_grad()
def test_the_tokens_of_a_question_that_is_removed_do_not_count() -> None:
    llama, method, cache = model("llama"), AtEnd(lambda site: site.positions < 6), DynamicCache()
    with apply(llama, method) as run:
        run.tentative = 4
        llama(tokens(1, N), past_key_values=cache)
        (end,) = method.ends
        assert end.ids is not None and end.ids.shape[1] == N - 4 and end.sites[0].seen == N - 4
        held = cache.layers[0].store.padded("positions")[0, 0].tolist()
        assert held == [*range(6), *range(N - 4, N)]
        cache.crop(-4)
        assert cache.layers[0].store.padded("positions")[0, 0].tolist() == list(range(6))
