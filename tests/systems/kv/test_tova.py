"""TOVA: its score and its steps by hand, and what the last query is good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.host import Method, Site, apply
from foveate.kv import TOVA, SinkRecent
from tests.conftest import ClaimFixture
from tests.support.constructed import BOS, VOCAB, induction_lm
from tests.support.host_models import Reads, feed, model, tokens
from tests.systems.kv.test_score_policies import N, best, kept, seen


def test_a_layer_keeps_what_all_its_heads_attend_to_last() -> None:
    llama, ids = model("llama"), tokens(1, N)
    k, weights = seen(llama, ids)
    last = weights[0, :, :, -1].flatten(0, 1).mean(0).expand(k.shape[1], -1)
    assert kept(llama, ids, TOVA(share=0.5))[0] == best(last, N // 2, [N - 1])
    for layer in kept(llama, ids, TOVA(share=0.3)):
        assert layer[0] == layer[1] and len(layer[0]) == 12 and N - 1 in layer[0]


@pytest.mark.parametrize("options", [{"share": 1.0}, {"share": 1.0, "limit": 60, "every": 1}], ids=["share", "limit"])
@torch.no_grad()
def test_with_room_for_everything_it_is_the_model(options: dict[str, float]) -> None:
    ids = tokens(2, N + 6)
    plain = feed(model("llama"), ids, torch.ones_like(ids), [N, *[1] * 6])
    with apply(model("llama"), TOVA(**options)):  # type: ignore[arg-type]
        torch.testing.assert_close(feed(model("llama"), ids, torch.ones_like(ids), [N, *[1] * 6]), plain)


def by_hand(q: Tensor, k: Tensor, prompt: int, size: int) -> list[list[int]]:
    """The paper's multi-state of `size` tokens after the prompt and after each later token.

    Args:
        q: queries of one sequence, `(Hq, N, D)`, scaled.
        k: keys, repeated for each query head.
        prompt: tokens of the prompt.
        size: tokens that stay.
    """
    states, state = [], list(range(prompt - 1))
    for token in range(prompt - 1, q.shape[1]):
        state = [*state, token]
        weights = torch.stack([(k[h, state] @ q[h, token]).softmax(0) for h in range(len(q))]).mean(0)
        dropped = weights[:-1].argsort()[: max(0, len(state) - size)].tolist()  # the newest stays
        state = [position for at, position in enumerate(state) if at not in dropped]
        states.append(state)
    return states


@torch.no_grad()
def test_each_step_drops_the_token_with_the_least_attention() -> None:
    """In the first layer, whose queries and keys do not depend on what was dropped."""
    ids, size, found = tokens(1, N + 20), 12, []
    reads = Reads(lambda site: (site.q[0] * site.scale, site.k[0].repeat_interleave(site.groups, 0)))
    with apply(model("llama"), reads):
        model("llama")(ids)
    with apply(model("llama"), TOVA(share=1.0, limit=size, every=1)):
        cache = DynamicCache()
        for piece in (ids[:, :N], *ids[:, N:].split(1, 1)):
            model("llama")(piece, past_key_values=cache)
            heads = cache.layers[0].store.padded("positions")[0].tolist()
            found.append([sorted(p for p in head if p >= 0) for head in heads])
    assert found == [[state] * 2 for state in by_hand(*reads.seen[0], N, size)]


class Counts(Method):
    """Notes how many keys each decoding call reads."""

    def __init__(self) -> None:
        self.keys: list[int] = []

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "decode":
            self.keys.append(site.k.shape[2])


@torch.no_grad()
def test_memory_and_reads_stay_as_they_are_while_decoding() -> None:
    ids, counts = tokens(1, N), Counts()
    with apply(model("llama"), TOVA(share=1.0, limit=12, every=1), counts) as run:
        model("llama").generate(ids, max_new_tokens=30, do_sample=False)
    assert max(counts.keys) <= 14 and run.stats.kept < 13 / (N + 29)


def test_queries_that_ask_find_what_they_ask_for(claim: ClaimFixture) -> None:
    """The last token occurred once before: a policy that looks at the last queries keeps what followed it."""
    lm, draw, right = induction_lm(), torch.Generator().manual_seed(0), {}
    texts = []
    for _ in range(24):
        words = 1 + torch.randperm(VOCAB - 1, generator=draw)[:30]
        texts.append(torch.cat([torch.tensor([BOS]), words, words[4:5]])[None])
    for policy in (TOVA(share=0.3, sink=1), SinkRecent(sink=1, recent=9)):
        found = 0
        for ids in texts:
            with torch.no_grad(), apply(lm, policy):
                cache = DynamicCache()
                lm(ids, past_key_values=cache)
                again = lm(ids[:, -1:], past_key_values=cache)  # asked again, and answered from what was kept
                found += int(again.logits[0, -1].argmax() == ids[0, 6])
        right[type(policy).__name__] = found / len(texts)
    claim(
        "of tokens that a question asks for, a policy that scores by the last query keeps those that recency drops",
        ours=right["TOVA"], baseline=right["SinkRecent"], better="higher", margin=0.3,
        baseline_name="sinks and recent tokens", seed=0,
    )  # fmt: skip
