"""Merged values: by hand, with every policy that evicts, in padded batches, and nearer to the full cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Context, Method, Slots, apply
from foveate.kv import H2O, KNorm, Merged, RandomKeep, SinkRecent, SnapKV, merged
from foveate.kv.merged import merged as added
from tests.contracts.policies import batch_error, subject
from tests.support.host_models import model, tokens


def slots(n: int, seed: int) -> Slots:
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 3, n, 4, generator=draw) for _ in range(2))
    return Slots(k, v, torch.arange(n).expand(2, 3, n))


@pytest.mark.parametrize("tile", [1, 1 << 20])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_values_are_added_to_the_most_similar_key(tile: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.kv.merged.TILE", tile)
    kept, dropped = slots(5, 0), slots(9, 1)
    able, real = torch.ones(2, 3, 5, dtype=torch.bool), torch.ones(2, 3, 9, dtype=torch.bool)
    able[0, 0, 2], real[1, 1, 4] = False, False
    kept.k[0, 0, 2] = kept.v[0, 0, 2] = dropped.k[1, 1, 4] = dropped.v[1, 1, 4] = torch.nan
    made = added(kept, dropped, able, real, threshold)
    for row in range(2):
        for head in range(3):
            total, weights = kept.v[row, head].clone(), torch.ones(5)
            for j in range(9):
                if not real[row, head, j]:
                    continue
                cosine = F.cosine_similarity(kept.k[row, head], dropped.k[row, head, j, None], dim=-1)
                to = int(cosine.masked_fill(~able[row, head], -2).argmax())
                sizes = dropped.v[row, head, j].norm(), kept.v[row, head, to].norm()
                weight = cosine[to] * sizes[0] / sum(sizes) if cosine[to] >= max(threshold, 0) else 0.0
                total[to] += weight * dropped.v[row, head, j]
                weights[to] += weight
            own = able[row, head]
            torch.testing.assert_close(made[row, head, own], (total / weights[:, None])[own], atol=1e-5, rtol=1e-5)
    assert made[0, 0, 2].isnan().all()


@pytest.mark.parametrize("policy", [SnapKV(recent=4), KNorm(every=3), H2O(), SinkRecent(2, 10), RandomKeep()], ids=repr)
def test_every_policy_keeps_its_tokens_with_other_values(policy: Method) -> None:
    llama, ids, stores = model("llama"), tokens(1, 40), []
    for methods in ((policy,), (policy, Merged())):
        cache = DynamicCache()
        with torch.no_grad(), apply(llama, *methods):
            llama(ids, past_key_values=cache)
            stores.append(cache.layers[0].store)
    for what, same in (("positions", True), ("k", True), ("v", False)):
        assert torch.equal(*(store.padded(what) for store in stores)) == same
    assert not stores[1].is_weighted


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pieces", ["whole", "chunks"])
def test_a_sequence_gets_the_same_result_in_a_batch_and_alone(side: str, pieces: str) -> None:
    methods = (SnapKV(share=0.3, recent=3, sink=1), Merged())
    off, _ = batch_error(subject("llama"), side, pieces, lambda: apply(subject("llama"), *methods))
    assert off < 1e-5


def test_a_question_gets_nothing_and_goes() -> None:
    llama, values = model("llama"), []
    for question in (None, tokens(1, 5, seed=1)):
        policy = SinkRecent(4, 12)
        context = Context(llama, policy, Merged()).read(tokens(1, 40), question=question)
        values.append(context.cache.layers[0].values)
    torch.testing.assert_close(*values)


def test_outputs_come_nearer_to_the_full_cache() -> None:
    """A sum over policies and texts in which words come again, so that dropped keys have similar kept ones."""
    llama, off = model("llama"), {"merged": 0.0, "dropped": 0.0}

    def logits(ids: Tensor, *methods: Method) -> Tensor:
        cache = DynamicCache()
        with torch.no_grad(), apply(llama, *methods):
            llama(ids, past_key_values=cache)
        with torch.no_grad(), apply(llama, *methods, evict="after prompt"):
            return llama(tokens(1, 1, seed=9), past_key_values=cache).logits

    for seed in range(6):
        ids = 2 + tokens(1, 100, seed=seed) % 6
        full = logits(ids)
        for policy in (RandomKeep(share=0.3), KNorm(share=0.3)):
            off["dropped"] += float((logits(ids, policy) - full).norm())
            off["merged"] += float((logits(ids, policy, Merged()) - full).norm())
    assert off["merged"] < 0.95 * off["dropped"], off


def test_windows_are_left_alone_and_options_checked() -> None:
    mistral, made = model("mistral"), []
    for methods in ((KNorm(0.1),), (KNorm(0.1), Merged())):
        cache = DynamicCache(config=mistral.config)
        with torch.no_grad(), apply(mistral, *methods):
            mistral(tokens(1, 30), past_key_values=cache)
            made.append(cache.layers[0].store.padded("v"))
    assert torch.equal(*made)
    with pytest.raises(OptionError, match="threshold=2"):
        replace(Merged(), threshold=2.0)
    assert merged.Merged is Merged
