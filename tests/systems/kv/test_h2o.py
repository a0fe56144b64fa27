"""H2O: sums of received attention by hand, through eviction, and what they are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foveate.core.errors import OptionError
from foveate.host import Method, Site, apply
from foveate.kv import H2O, RandomKeep, ScorePolicy, SinkRecent
from foveate.kv.parts import slot_notes
from tests.conftest import ClaimFixture
from tests.support.host_models import VOCAB, model, tokens
from tests.systems.kv.test_score_policies import best, kept, seen

N = 40


class Queries(Method):
    """Notes the first layer's queries and keys, which do not depend on what is evicted."""

    def __init__(self) -> None:
        self.q, self.k, self.scale = torch.empty(0), torch.empty(0), 0.0

    def read(self, site: Any, out: Tensor) -> None:
        if site.order == 0:
            self.q, self.k, self.scale = site.q[0].double(), site.k[0].double(), site.scale


def by_hand(llama: PreTrainedModel, ids: Tensor, pieces: list[int], policy: H2O) -> list[list[int]]:
    """What each head of the first layer keeps, by loops over heads, tokens and slots."""
    watch, out = Queries(), []
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    groups = watch.q.shape[0] // watch.k.shape[0]
    for head, keys in enumerate(watch.k):
        sums: dict[int, float] = {}
        end = 0
        for piece in pieces:
            sums |= dict.fromkeys(range(end, end + piece), 0.0)
            for token in range(end, end + piece):
                visible = [slot for slot in sums if slot <= token]
                for q in watch.q[head * groups : (head + 1) * groups, token]:
                    weights = (keys[visible] @ q * watch.scale).softmax(-1)
                    for slot, weight in zip(visible, weights.tolist(), strict=True):
                        sums[slot] += weight
            end += piece
            if piece == 1 and policy.every is None:
                continue
            size = round(end * policy.share)
            newest = int(round(end * policy.share) * policy.newest)
            order = sorted(sums, key=lambda slot: (slot < end - newest, -sums[slot]))
            sums = {slot: sums[slot] for slot in order[:size]}
        out.append(sorted(sums))
    return out


def after(llama: PreTrainedModel, ids: Tensor, pieces: list[int], policy: ScorePolicy) -> list[list[int]]:
    cache, end = DynamicCache(), 0
    with torch.no_grad(), apply(llama, policy):
        for piece in pieces:
            llama(ids[:, end : end + piece], past_key_values=cache)
            end += piece
        found = cache.layers[0].store.padded("positions")[0]
    return [sorted(p for p in head.tolist() if p >= 0) for head in found]


@pytest.mark.parametrize("pieces", [[N], [12] + [1] * 28, [17, 17, 6], [7, 13] + [1] * 20], ids=str)
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_what_is_kept_is_what_loops_keep(pieces: list[int], share: float) -> None:
    for seed, every in ((0, 1), (1, None)):
        policy, ids = H2O(share=share, every=every), tokens(1, N, seed)
        assert after(model("llama"), ids, pieces, policy) == by_hand(model("llama"), ids, pieces, policy)


def test_kvpress_divides_by_the_queries_that_could_see_a_token() -> None:
    llama, ids = model("llama"), tokens(1, N)
    _, weights = seen(llama, ids)
    means = weights[0].sum(2).mean(1) / torch.arange(N, 0, -1)
    assert kept(llama, ids, H2O(share=0.5, variant="kvpress"))[0] == best(means, N // 2)


def test_with_newest_tokens_alone_it_is_a_window() -> None:
    llama, pieces = model("llama"), [12] + [1] * 28
    assert after(llama, tokens(1, N), pieces, H2O(share=0.3, newest=1.0)) == [list(range(N - 12, N))] * 2


def test_an_adaptive_budget_keeps_its_sums_too() -> None:
    """Heads hold different numbers of tokens, so that slots move; what is kept is what one head's loops would keep."""
    llama, ids, pieces = model("llama"), tokens(1, N), [20] + [1] * 20
    cache, end = DynamicCache(), 0
    policy = H2O(share=0.3, heads="adaptive", every=3)
    with torch.no_grad(), apply(llama, policy) as run:
        for piece in pieces:
            llama(ids[:, end : end + piece], past_key_values=cache)
            end += piece
            notes = run.caches.notes[cache][id(policy), 0]
            positions = cache.layers[0].store.padded("positions")
            for head in range(2):
                stored = sorted(p for p in positions[0, head].tolist() if p >= 0)
                noted = [p for p in notes["positions"][0, head].tolist() if p < N]
                assert noted == stored
        assert float(notes["numbers"][notes["positions"] < N].min()) > 0.0
        assert len({len([p for p in head.tolist() if p >= 0]) for head in positions[0]}) > 1


def call(positions: list[int], new: int, seen: int) -> Site:
    """A call of `new` queries over slots at these positions."""
    x = torch.zeros(1, 1, len(positions), 2)
    site = Site(nn.Identity(), 0, x[:, :, :new], x, x, scale=1.0, attention_mask=None, is_causal=True)
    site.__dict__.update(positions=torch.tensor([[positions]], dtype=torch.int32), seen=seen)
    return site


def numbers(*values: float) -> Tensor:
    return torch.tensor([[list(values)]])


def test_notes_of_slots_follow_the_tokens() -> None:
    notes: dict[str, Any] = {}
    slot_notes.add(notes, call([0, 1, 2], 3, 3), numbers(1.0, 2.0, 3.0))
    slot_notes.add(notes, call([2, -1, 0, 3], 1, 4), numbers(10.0, 90.0, 20.0, 30.0))  # moved, one gone, one new
    assert torch.equal(slot_notes.find(notes, call([0, 2, 3, -1], 1, 4)), numbers(21.0, 13.0, 30.0, 0.0))
    assert torch.equal(slot_notes.find(notes, call([1, 3, 4], 1, 5)), numbers(0.0, 30.0, 0.0))  # unknown tokens
    slot_notes.trim(notes, call([0, 3, 2], 1, 4), torch.tensor([[[True, False, True]]]), 2)
    assert torch.equal(slot_notes.find(notes, call([3, 2, 0], 1, 4)), numbers(0.0, 13.0, 21.0))
    assert notes["numbers"].shape[-1] == 2


def test_a_token_that_was_removed_leaves_nothing_to_its_successor() -> None:
    notes: dict[str, Any] = {}
    slot_notes.add(notes, call([0, 1, 2], 3, 3), numbers(1.0, 2.0, 3.0))
    slot_notes.add(notes, call([0, 1, 2], 1, 3), numbers(10.0, 10.0, 10.0))  # the cache was cropped to two tokens
    assert torch.equal(slot_notes.find(notes, call([0, 1, 2], 1, 3)), numbers(11.0, 12.0, 10.0))


def divergence(lm: PreTrainedModel, policy: Method, length: int = 120, steps: int = 16) -> float:
    """KL divergence of the next tokens' distribution from the full cache's, in nats."""
    total = 0.0
    for seed in range(3):
        ids, cache = tokens(1, length + steps, seed), DynamicCache()
        with torch.no_grad():
            full = lm(ids).logits[:, length:].log_softmax(-1)
            with apply(lm, policy):
                lm(ids[:, :length], past_key_values=cache)
                made = [lm(ids[:, i : i + 1], past_key_values=cache).logits for i in range(length, length + steps)]
            total += float((full.exp() * (full - torch.cat(made, 1).log_softmax(-1))).sum(-1).mean())
    return total / 3


def test_heavy_hitters_matter(claim: ClaimFixture) -> None:
    """A random model attends sharply, so that few tokens receive most of it."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8)
    lm = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, max_position_embeddings=256)).eval()  # type: ignore[arg-type]
    ours = divergence(lm, H2O(share=0.3))
    for name, other in (
        ("the newest tokens, as many", SinkRecent(sink=0, recent=36)),
        ("random tokens, as many", RandomKeep(share=0.3, every=1)),
    ):
        claim(
            "half heavy hitters, half newest predict what the full cache does (KL from it, nats)",
            ours=ours, baseline=divergence(lm, other), better="lower", margin=0.5, baseline_name=name, seed=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [({"newest": 1.5}, "newest=1.5"), ({"variant": "h2o"}, "variant='h2o'"), ({"every": 0}, "every=0")],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        H2O(**options)
