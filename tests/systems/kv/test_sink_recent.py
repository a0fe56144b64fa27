"""Sinks and a recent window do what the paper claims, on a model with a constructed sink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core import masks
from foveate.host import EMPTY, Method, apply
from foveate.kv.sink_recent import SinkRecent
from tests.conftest import ClaimFixture
from tests.support.constructed import BOS, VOCAB, induction_lm
from tests.support.host_models import DECODERS, feed, model, padded, tokens

PIECES = [12, *[1] * 8]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_a_window_that_holds_everything_is_dense(name: str, side: str) -> None:
    ids, mask = padded(tokens(2, 20), side)
    expected = feed(model(name), ids, mask, PIECES)
    for policy in (SinkRecent(sink=0, recent=20), SinkRecent(sink=16, recent=4)):
        with apply(model(name), policy) as run:
            got = feed(model(name), ids, mask, PIECES)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert run.stats.calls


@torch.no_grad()
def test_read_token_by_token_it_is_the_mask_of_sinks_and_a_window() -> None:
    llama, ids = model("llama"), tokens(2, 20)
    seen = masks.window(20, 20, 5 + 1, sinks=3)  # the query's own token and the five that were kept
    expected = llama(ids, attention_mask=seen[None, None].expand(2, 1, 20, 20)).logits
    with apply(llama, SinkRecent(sink=3, recent=5)):
        got = feed(llama, ids, torch.ones_like(ids), [1] * 20).view_as(expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sinks_and_window_are_stored() -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, SinkRecent(sink=2, recent=3)) as run:
        llama(tokens(2, 30), past_key_values=cache)
        llama(tokens(2, 1), past_key_values=cache)
        for layer in cache.layers:
            positions = layer.store.padded("positions").sort(-1).values
            assert positions[..., -5:].tolist() == [[[0, 1, 28, 29, 30]] * 2] * 2
            assert bool((positions[..., :-5] == EMPTY).all()) and layer.store.stored == 2 * 2 * 5
        assert run.stats.kept == 5 / 31
    assert cache.get_seq_length() == 31


@torch.no_grad()
def test_a_padded_sequence_keeps_its_own_first_tokens() -> None:
    ids, mask = padded(tokens(2, 20), "left", 5)
    with apply(model("llama"), SinkRecent(sink=3, recent=4)):
        cache = DynamicCache()
        feed(model("llama"), ids, mask, [20], cache)
        assert cache.layers[0].store.padded("positions")[:, 0].tolist() == [
            [5, 6, 7, 16, 17, 18, 19], [0, 1, 2, 16, 17, 18, 19],
        ]  # fmt: skip


def distinct_tokens(count: int) -> Tensor:
    """Return sequences without repetition: the matching head finds no match and attends to its sink."""
    draw = torch.Generator().manual_seed(0)
    rest = [1 + torch.randperm(VOCAB - 1, generator=draw) for _ in range(count)]
    return torch.cat([torch.full((count, 1), BOS), torch.stack(rest)], 1)


@torch.no_grad()
def test_sinks_matter(claim: ClaimFixture) -> None:
    """A head without a match attends to the first token; if that is evicted, it attends to all others."""
    lm, ids = induction_lm(), distinct_tokens(8)

    def log_probabilities(*methods: Method) -> Tensor:
        with apply(lm, *methods):
            logits = feed(lm, ids, torch.ones_like(ids), [20, *[1] * (VOCAB - 20)])
        return logits.view(8, VOCAB, VOCAB)[:, 20:].log_softmax(-1)

    dense = log_probabilities()

    def divergence(policy: SinkRecent) -> float:
        return float((dense.exp() * (dense - log_probabilities(policy))).sum(-1).mean())

    claim(
        "with sinks, a window past its length predicts what the full cache does (KL from it, nats)",
        ours=divergence(SinkRecent(sink=4, recent=12)),
        baseline=divergence(SinkRecent(sink=0, recent=16)),
        better="lower",
        margin=0.1,
        baseline_name="a window without sinks, same size",
        seed=0,
    )


@torch.no_grad()
def test_budget() -> None:
    from foveate.host.hf.model import host

    for budget, kept in ((0.25, 10), (0.1, 4), (0.02, 1)):
        policy = SinkRecent.at_budget(budget, host(model("llama")), 40)
        with apply(model("llama"), policy) as run:
            model("llama")(tokens(2, 40))
        assert run.stats.kept == kept / 40
