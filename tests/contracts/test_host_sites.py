"""A site describes its call, and holds the notes of methods from one call to the next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import foveate
from foveate.host import Method, Site
from tests.support.host_models import Evicts, Reads, Recent, model, padded, tokens, use


@pytest.mark.parametrize("cache", ["dynamic", "model's", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_sites_of_a_decoder(name: str, cache: str) -> None:
    subject = model(name)
    kinds = {
        "dynamic": DynamicCache,
        "model's": lambda: DynamicCache(config=subject.config),
        "static": lambda: StaticCache(config=subject.config, max_cache_len=32),
    }
    past = kinds[cache]()
    sites = Reads(
        lambda site: (
            site.layer, site.phase, site.seen, site.query_positions.tolist(), site.groups, tuple(site.hidden.shape)
        )
    )  # fmt: skip
    with foveate.apply(subject, sites):
        for begin, end in ((0, 1), (1, 2), (2, 14), (14, 15)):
            subject(tokens(2, 15)[:, begin:end], past_key_values=past)
    expected = [("prefill", 1, [0]), ("decode", 2, [1]), ("decode", 14, [*range(2, 14)]), ("decode", 15, [14])]
    expected = [(phase, seen, queries, 2, (2, len(queries), 32)) for phase, seen, queries in expected]
    assert sites.seen == [(layer, *rest) for rest in expected for layer in range(3)]


@torch.no_grad()
def test_positions_of_sliding_layers() -> None:
    """A layer with a window holds recent tokens only; each key keeps its position, stored natively or in slots."""
    mistral = model("mistral")
    for methods in ((), (Evicts(),)):
        cache, found = (
            DynamicCache(config=mistral.config),
            Reads(lambda site: (site.positions.clone(), site.k, site.mask)),
        )
        with foveate.apply(mistral, *methods, found):
            mistral(tokens(), past_key_values=cache)
            mistral(tokens(2, 1), past_key_values=cache)
            mistral(tokens(2, 2), past_key_values=cache)
        for positions, k, _ in found.seen[:3]:
            assert positions[0, 0].tolist() == [*range(14)] and k.shape[2] == 14
        for positions, k, _ in found.seen[3:6]:
            assert sorted(positions[0, 0].tolist()) == [*range(7, 15)] and k.shape[2] == 8
        for positions, k, mask in found.seen[6:]:
            order = positions[0, 0].argsort()
            assert positions[0, 0, order].tolist() == [*range(8, 17)] and k.shape[2] == 9
            assert mask[0, 0][:, order].tolist() == [[True] * 8 + [False], [False] + [True] * 8]


@torch.no_grad()
def test_sites_of_encoders() -> None:
    ids, mask = padded(tokens(), "right")
    sites = Reads(lambda site: (site.layer, site.phase, site.seen, site.is_causal, site.cache))
    with foveate.apply(model("bert"), sites):
        model("bert")(ids, attention_mask=mask)
        model("bert")(ids[:, :1])
    assert sites.seen == [(layer, "prefill", n, False, None) for n in (14, 1) for layer in (0, 1)]
    sites.seen.clear()
    with foveate.apply(model("vit"), sites):
        use(model("vit"))
    assert sites.seen == [(layer, "prefill", 17, False, None) for layer in (0, 1)]


@torch.no_grad()
def test_sites_of_an_encoder_decoder() -> None:
    """Cross-attention has no slots: the decoder drops its own tokens, not the encoder's."""
    bart, (ids, mask) = model("bart"), padded(tokens(), "right")
    sites = Reads(lambda site: (site.is_causal, site.slots is not None, site.seen, site.k.shape[2]))
    encoder, decoder = [(False, False, 14, 14)] * 2, []
    for step in range(1, 7):
        decoder += [(True, True, step, min(step, 4)), (False, False, 14, 14)] * 2
    for on, expected in (("all", encoder + decoder), ("decoder", decoder), ("auto", decoder)):
        sites.seen.clear()
        with foveate.apply(bart, Recent(3), sites, on=on):
            bart.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert sites.seen == expected


@torch.no_grad()
def test_padded_sequences_begin_at_their_first_token() -> None:
    for side, begins in (("left", [4, 0]), ("right", [0, 0]), ("none", [0, 0])):
        ids, mask = padded(tokens(), side)
        sites = Reads(lambda site: site.begins.tolist())
        with foveate.apply(model("llama"), sites):
            model("llama")(ids, attention_mask=mask)
        assert sites.seen == [begins] * 3


@torch.no_grad()
def test_arguments_by_position() -> None:
    """A model may pass the hidden states and the cache to its attention modules by position."""
    llama, cache = model("llama"), DynamicCache()
    hidden, attention = torch.randn(2, 9, 32), model("llama").model.layers[0].self_attn
    rotary = llama.model.rotary_emb(hidden, torch.arange(9)[None])
    sites = Reads(lambda site: (site.hidden is hidden, site.cache is cache, site.slots is not None, site.seen))
    with foveate.apply(llama, Recent(3), sites):
        attention(hidden, rotary, None, cache)
        assert cache.layers[0].store.stored == 2 * 2 * 3
    assert sites.seen == [(True, True, True, 9)]


# -- notes of methods --------------------------------------------------------------------------------------------------


class Counts(Method):
    """A method that counts its calls: per layer, per sequence and per forward pass."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int, int]] = []

    def read(self, site: Site, out: Tensor) -> None:
        notes, shared = site.notes(self), site.notes(self, all_layers=True)
        notes["calls"] = notes.get("calls", 0) + 1
        shared["calls"] = shared.get("calls", 0) + 1
        site.step["calls"] = site.step.get("calls", 0) + 1
        self.counts.append((notes["calls"], shared["calls"], site.step["calls"]))


@torch.no_grad()
def test_notes_belong_to_a_layer_and_a_sequence() -> None:
    llama, method = model("llama"), Counts()
    with foveate.apply(llama, method):
        for caches in ((DynamicCache(),), (DynamicCache(),)):
            for _ in range(2):
                llama(tokens(2, 3), past_key_values=caches[0])
    assert method.counts == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 1), (2, 5, 2), (2, 6, 3)] * 2


@torch.no_grad()
def test_notes_end_with_the_sequence_and_with_the_run() -> None:
    llama, cache, method = model("llama"), DynamicCache(), Counts()
    once = [(1, 1, 1), (1, 2, 2), (1, 3, 3)]
    with foveate.apply(llama):
        for _ in range(2):
            with foveate.apply(llama, method):
                llama(tokens(2, 3), past_key_values=cache)
        assert method.counts == once * 2
        cache.reset()
        with foveate.apply(llama, method):
            llama(tokens(2, 3), past_key_values=cache)
            cache.reset()
            llama(tokens(2, 3), past_key_values=cache)
    assert method.counts == once * 4


@torch.no_grad()
def test_notes_follow_beam_search() -> None:
    """The notes on a sequence move with it to another place in the batch."""
    llama = model("llama")

    class Follows(Method):
        checks = 0

        def read(self, site: Site, out: Tensor) -> None:
            notes = site.notes(self)
            if site.phase == "prefill":
                notes["first"] = site.k[:, 0, :, 0].clone()
                return
            n = notes["first"].shape[1]
            assert torch.equal(site.k[:, 0, :n, 0], notes["first"])
            notes["first"] = site.k[:, 0, :, 0].clone()
            Follows.checks += 1

    with foveate.apply(llama, Follows()):
        llama.generate(tokens(2, 6), max_new_tokens=8, num_beams=4, do_sample=False)
    assert Follows.checks == 3 * 7
