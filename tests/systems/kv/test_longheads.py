"""LongHeads reads chosen chunks at positions within the trained length, on tensors and on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.core.errors import FoveateError, OptionError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv.longheads import LongHeads
from foveate.kv.parts.chosen_chunks import ChosenChunks
from foveate.kv.parts.chunk_keys import chunk_keys
from foveate.kv.renumbered import rotations
from foveate.kv.sink_recent import SinkRecent
from foveate.labs import LABS
from foveate.tasks.parts.corpus import text
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import Reads, feed, model, padded, tokens

WHOLE, CHUNKS, DECODING = [40], [7, 19, 5, 8, 1], [20, *[1] * 20]


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_within_the_attention_length_it_is_the_model(name: str) -> None:
    ids, mask = padded(tokens(2, 40), "left")
    for pieces in (WHOLE, CHUNKS):
        expected = feed(model(name), ids, mask, pieces)
        with apply(model(name), LongHeads(5, 40)):
            assert torch.equal(feed(model(name), ids, mask, pieces), expected)


@pytest.mark.parametrize("pieces", [WHOLE, DECODING])
@torch.no_grad()
def test_a_padded_sequence_within_the_attention_length_is_dense(pieces: list[int]) -> None:
    """All of its chunks are chosen, and their numbering is that of the text."""
    ids, mask = padded(tokens(2, 40), "left", 18)
    expected = feed(model("llama"), ids, mask, pieces)
    with apply(model("llama"), LongHeads(4, 24)):
        got = feed(model("llama"), ids, mask, pieces)
    torch.testing.assert_close(got[:22], expected[:22], atol=1e-4, rtol=1e-4)
    assert (got[22:] - expected[22:]).abs().max() > 0.01


# -- the mechanism -----------------------------------------------------------------------------------------------------


class Checks(Method):
    """A method that computes each output by hand: keys and queries without positions, numbered again, one by one."""

    def __init__(self, policy: LongHeads) -> None:
        self.policy, self.checked, self.farthest = policy, 0, 0
        self.queries: dict[int, Tensor] = {}

    def read(self, site: Site, out: Tensor) -> None:
        rotation, length, w = rotations(host(model("llama")))[site.layer], site.seen, self.policy.chunk
        assert rotation is not None
        before = self.queries.get(site.layer, site.q[:, :, :0])
        q = self.queries[site.layer] = torch.cat([before, site.q], 2)
        there = torch.arange(length).expand(1, 1, -1)
        plain_q, plain_k = (rotation(x, -there.expand(*x.shape[:3])) for x in (q, site.k))
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                kq, kk, kv = plain_q[b, h], plain_k[b, h // site.groups], site.v[b, h // site.groups]
                keys = [self.key(site, rotation, kq, kk, kv, c * w) for c in range(length // w)]
                for i in range(length - site.q.shape[2], length):
                    chunks = self.chunks(kq[i], keys, i // w)
                    read = [j for c in chunks for j in range(c * w, (c + 1) * w) if j <= i]
                    place = torch.tensor([r * w + j for r, c in enumerate(chunks) for j in range(w) if c * w + j <= i])
                    self.farthest = max(self.farthest, int(place[-1]))
                    turned = rotation(kk[read][None, None], place[None, None])[0, 0]
                    query = rotation(kq[i][None, None, None], place[-1:][None, None])[0, 0, 0]
                    weights = (turned @ query * site.scale).softmax(-1)
                    torch.testing.assert_close(
                        out[b, h, i - length + site.q.shape[2]], weights @ kv[read], atol=1e-4, rtol=1e-3
                    )
        self.checked += 1

    def key(self, site: Site, rotation: Any, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        some = slice(start, start + self.policy.chunk)
        near = torch.arange(self.policy.chunk)[None, None]
        local_q, local_k = (rotation(x[some][None, None], near)[0, 0] for x in (q, k))
        value = ((local_q @ local_k.T * site.scale).softmax(-1) @ v[some]).mean(0)
        return (local_k @ value * site.scale).softmax(-1) @ local_k

    def chunks(self, q: Tensor, keys: list[Tensor], current: int) -> list[int]:
        forced = {*range(min(1, current + 1)), *range(max(0, current - 1), current + 1)}
        others = sorted(set(range(current)) - forced, key=lambda c: -float(q @ keys[c]))
        return sorted({*forced, *others[: self.policy.chunks - 3]})


@pytest.mark.parametrize("pieces", [WHOLE, CHUNKS, DECODING], ids=["whole", "chunks", "decoding"])
@pytest.mark.parametrize("chunk, length", [(4, 20), (5, 20), (3, 9)])
@torch.no_grad()
def test_chosen_chunks_are_read_at_their_new_positions(pieces: list[int], chunk: int, length: int) -> None:
    ids, policy = tokens(2, 40), LongHeads(chunk, length)
    checks = Checks(policy)
    with apply(model("llama"), policy, checks):
        feed(model("llama"), ids, torch.ones_like(ids), pieces)
    assert checks.checked == 3 * len(pieces)
    assert checks.farthest < length < 40


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunk_by_chunk_equals_query_by_query(bias: bool, softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    own = torch.arange(27, 50).expand(2, -1)
    chosen = torch.randint(0, 6, (2, 4, 23, 3), generator=draw).sort(-1).values
    chosen[..., 2] = own[:, None] // 4
    valid = torch.ones_like(chosen, dtype=torch.bool)
    valid[..., :2] = chosen[..., :2] != chosen[..., 1:]
    q, k = torch.randn(2, 4, 23, 3, 8, generator=draw), torch.randn(2, 2, 50, 8, generator=draw)
    given = torch.randn(2, 1, 23, 50, generator=draw)
    read = ChosenChunks(chosen, valid, own, 4, 0.3, softcap, given if bias else given > -1)
    expected = read.by_query(q, k, k + 1, lambda numbers: numbers.clamp_max(49))
    torch.testing.assert_close(read.by_chunk(q, k, k + 1), expected, atol=1e-5, rtol=1e-5)


def test_a_chunk_of_equal_keys_has_their_key() -> None:
    q, v = torch.randn(1, 4, 3, 5, 8), torch.randn(1, 2, 3, 5, 8)
    k = torch.randn(1, 2, 3, 1, 8).expand_as(v)
    torch.testing.assert_close(chunk_keys(q, k, v, k, 0.3), k[..., 0, :].repeat_interleave(2, 1))


@torch.no_grad()
def test_forced_chunks_are_always_read_and_the_number_is_bounded() -> None:
    policy, draw = LongHeads(4, 24, keep_first=2, keep_last=3), torch.Generator().manual_seed(0)
    own = torch.arange(200)[None]
    chosen, valid = policy.choose(
        torch.randn(1, 4, 200, 8, generator=draw), own, torch.randn(1, 4, 50, 8, generator=draw)
    )
    for i in range(200):
        for h in range(4):
            found = chosen[0, h, i][valid[0, h, i]].tolist()
            last = i // 4
            assert found == sorted(set(found)) and len(found) == min(6, last + 1)
            assert {c for c in (0, 1, last - 2, last - 1, last) if 0 <= c <= last} <= set(found)


@torch.no_grad()
def test_heads_cover_more_together_than_alone() -> None:
    ratios = []

    def coverage(site: Site) -> None:
        notes = next(x for (_, layer), x in site.all_notes.items() if layer == site.layer and "chunks" in x)
        chosen, valid = policy.choose(site.q[:, :, -1:], torch.tensor([[127]]), notes["chunks"])
        sets = [set(chosen[0, h, 0][valid[0, h, 0]].tolist()) for h in range(4)]
        ratios.append(len(set.union(*sets)) / (sum(map(len, sets)) / 4))

    policy = LongHeads(4, 32)
    with apply(model("llama"), policy, Reads(coverage)):
        model("llama")(tokens(1, 128), past_key_values=DynamicCache())
    assert sum(ratios) / len(ratios) > 1.5


@torch.no_grad()
def test_drafts_do_not_change_the_text() -> None:
    llama, ids = model("llama"), tokens(1, 12).repeat(1, 3)
    with apply(llama, LongHeads(4, 16)):
        plain = llama.generate(ids, max_new_tokens=16, do_sample=False)
        drafted = llama.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted)


@torch.no_grad()
@torch.no_grad()
def test_a_cropped_cache_forgets_the_queries_of_the_removed_tokens() -> None:
    llama, ids = model("llama"), tokens(1, 90)
    method, found = LongHeads(chunk=8, attention_length=32), []
    for extra in (0, 2):
        cache = DynamicCache()
        with apply(llama, method):
            llama(torch.cat([ids[:, :10], ids[:, :extra]], 1), past_key_values=cache)
            if extra:
                cache.crop(-extra)
            found.append(llama(ids[:, 10:], past_key_values=cache).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_reads_are_counted_and_nothing_is_evicted() -> None:
    with apply(model("llama"), LongHeads(4, 16)) as run:
        cache = DynamicCache()
        model("llama").generate(tokens(2, 40), max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert run.stats.read == pytest.approx(sum((13 + (n - 1) % 4) / n for n in range(41, 46)) / 5)
    assert run.stats.kept == 1.0 and cache.layers[0].keys.shape[2] == 45


# -- what the paper claims ---------------------------------------------------------------------------------------------


def test_retrieval_from_far_away(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, answers = recall(8, length=256, answer=4, away=100)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    claim(
        "with 8 chunks of 8 tokens out of 32, an induction model recalls four tokens from far behind",
        ours=score(LongHeads(8, 64)), baseline=score(SinkRecent(sink=8, recent=56)), better="higher", margin=0.5,
        baseline_name="sinks and a recent window, same size", seed=0,
    )  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
def test_it_reads_text_beyond_the_trained_length(claim: ClaimFixture) -> None:
    lab = hf.AutoModelForCausalLM.from_pretrained(LABS["lm"].path).eval()
    ids = hf.AutoTokenizer.from_pretrained(LABS["lm"].path)(text("heldout")[:6144], return_tensors="pt").input_ids
    ids = ids[:, :6144]

    def loss() -> float:
        logits = lab(ids, past_key_values=DynamicCache(config=lab.config)).logits
        return F.cross_entropy(logits[0, -257:-1], ids[0, -256:]).item()

    plain = loss()
    with apply(lab, LongHeads(128, 2048)):
        ours = loss()
    claim(
        "the lab model reads 6,144 bytes, half as much again as its context, at distances under 2,048: next-byte loss",
        ours=ours, baseline=plain, better="lower", margin=1.5, baseline_name="all keys at their own distances",
        seed=0,
    )  # fmt: skip


# -- small parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_that_was_read_without_it_is_refused() -> None:
    llama, ids, cache = model("llama"), tokens(1, 40), DynamicCache()
    llama(ids[:, :30], past_key_values=cache)
    with (
        apply(llama, LongHeads(4, 16)),
        pytest.raises(OptionError, match="apply it before the first token.*30 tokens were read, and it saw 0"),
    ):
        llama(ids[:, 30:], past_key_values=cache)


def test_models_that_it_cannot_renumber_are_refused() -> None:
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModel, match="do not rotate"), apply(gpt2, LongHeads(4, 16)):
        pass
    with (
        pytest.raises(UnsupportedModel, match="attention_length: longheads"),
        apply(model("mistral"), LongHeads(4, 16)),
    ):
        pass


def test_budget() -> None:
    here = host(model("llama"))
    policy = LongHeads.at_budget(0.25, here, 1024)
    assert (policy.chunk, policy.attention_length) == (32, 256)
    assert LongHeads.at_budget(1.0, here, 1001).attention_length >= 1001
    assert LongHeads.at_budget(0.0, here, 100).attention_length == 4
    assert LongHeads.at_budget(0.25, here, 65536).chunk == 256


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"chunk": 0}, "chunk=0 must be a whole number, at least 1"),
        ({"chunk": 5, "attention_length": 21}, "attention_length=21 must be a multiple of chunk=5"),
        ({"chunk": 5, "attention_length": 10}, "attention_length=10 must hold keep_first"),
        ({"keep_last": 0}, "keep_last=0 must be a whole number, at least 1"),
        ({"keep_first": -1}, "keep_first=-1 must be a whole number, at least 0"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        LongHeads(**bad)
